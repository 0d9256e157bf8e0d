// Calls every function with many shapes from two threads, for the sanitizers: `make sanitize`.

#include <cstdio>
#include <thread>

#include "kernels.cpp"

static std::vector<float> numbers(int64_t count, unsigned seed) {
    std::vector<float> result(count);
    for (auto &value : result) value = float((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
    return result;
}

static void exercise_matrix(Type type, int64_t outputs, int64_t inputs) {
    const int64_t most_rows = 37;  // several tiles of every instruction set
    const std::vector<char> rows(4 * outputs * inputs, 1);
    std::vector<char> packed(packed_bytes(type, outputs, inputs));
    std::vector<float> rounded_scales(outputs);
    const auto scales = numbers(outputs, 1), bias = numbers(outputs, 2), x = numbers(most_rows * inputs, 3);
    const auto residual = numbers(most_rows * outputs, 4);
    const Matrix matrix{packed.data(), type == Type::int8 ? scales.data() : nullptr, outputs, inputs, type};
    for (const Type from : {Type::bfloat16, Type::float32})
        pack(&matrix, rows.data(), type == Type::int8 ? from : type, packed.data(), rounded_scales.data());
    for (int64_t count = 0; count <= most_rows; count++) {
        std::vector<float> y(count * outputs);
        const Linear finished{&matrix, bias.data(), Activation(count % 6), 0.5f}, plain{&matrix, nullptr, {}, INFINITY};
        linear(&finished, x.data(), count, y.data(), residual.data());
        linear(&plain, x.data(), count, y.data(), nullptr);
    }
    const std::vector<int64_t> ids{0, outputs - 1};
    std::vector<float> y(2 * inputs);
    embedding(&matrix, ids.data(), 2, y.data());
    const Norm centered{x.data(), nullptr, 1e-5f, false};
    norm(&centered, x.data(), most_rows, inputs, std::vector<float>(most_rows * inputs).data());
}

static void exercise_attention(Type type, int64_t head_dim, int64_t n_kv_heads, int64_t window) {
    const int64_t block_size = 16, n_heads = 4, counts[] = {1, 40, 1}, starts[] = {150, 0, 3};
    const int64_t tables[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const int64_t query_starts[] = {0, counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]};
    const int64_t tokens = query_starts[3], cached = 14 * n_kv_heads * block_size * (head_dim + 2);
    const auto query = numbers(tokens * n_heads * head_dim, 5), key = numbers(tokens * n_kv_heads * head_dim, 6);
    std::vector<float> context(tokens * n_heads * head_dim), keys(cached), values(cached);
    const float slopes[] = {0.5f, 0.25f, 0.125f, 0.0625f};
    const AttentionStep step{tokens, 3, n_heads, n_kv_heads, head_dim, block_size,
                             n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim,
                             query.data(), key.data(), key.data(), context.data(), keys.data(), values.data(),
                             query_starts, starts, tables, 10, slopes, 0.1f, window};
    attend(&step, type);
}

// Choices from rows of many sizes, which are not side by side; one has values that are not finite, one only -inf.
static void exercise_choices() {
    constexpr int64_t ROWS = 5;
    for (const int64_t size : {1, 15, 16, 17, 5000}) {
        const int64_t stride = size + 3;
        auto x = numbers(ROWS * stride, 6);
        x[0] = NAN, x[size - 1] = INFINITY;
        std::fill_n(&x[stride], size, -INFINITY);
        int64_t indices[ROWS];
        bool are_finite[ROWS];
        argmax_rows(x.data(), stride, ROWS, size, indices, are_finite);
        std::vector<DrawOptions> rows;
        for (int64_t row = 0; row < ROWS; row++)
            rows.push_back({&x[row * stride], 7, uint64_t(row), std::min<int64_t>(size, 20), 0.9, 0.5f, 0.01f});
        draw_rows(rows.data(), ROWS, size, indices);
        for (auto &options : rows) options.top_k = size, options.top_p = options.position / 4., options.temperature = 1e-30f;
        draw_rows(rows.data(), ROWS, size, indices);
    }
}

// Two layers with everything that a layer may have, for one sequence of 20 tokens.
static void exercise_layers(Type type) {
    const int64_t size = 64, hidden_size = 132, n_heads = 4, head_dim = 16, n_kv_heads = 2, block_size = 16, tokens = 20;
    const int64_t width = size + 2 * n_kv_heads * head_dim, layer_floats = 2 * n_kv_heads * block_size * (head_dim + 2);
    std::vector<std::vector<char>> packed;
    std::vector<Matrix> matrices;
    const auto scales = numbers(width + hidden_size, 1), weight = numbers(size, 2);
    const std::vector<char> rows(4 * hidden_size * (width + hidden_size), 1);
    packed.reserve(5), matrices.reserve(5);
    const auto linear = [&](int64_t outputs, int64_t inputs) {
        packed.emplace_back(packed_bytes(type, outputs, inputs));
        matrices.push_back({packed.back().data(), type == Type::int8 ? scales.data() : nullptr, outputs, inputs, type});
        std::vector<float> rounded_scales(outputs);
        pack(&matrices.back(), rows.data(), type == Type::int8 ? Type::float32 : type, packed.back().data(),
             rounded_scales.data());
        return Linear{&matrices.back(), nullptr, Activation::gelu, 0.5f};
    };
    const Norm norm{weight.data(), nullptr, 1e-5f, false};
    const Layer layer{norm, linear(width, size), norm, norm, linear(size, size), norm, linear(hidden_size, size),
                      linear(hidden_size, size), linear(size, hidden_size)};
    const Layer both[] = {layer, layer};
    auto x = numbers(tokens * size, 3), keys = numbers(2 * layer_floats, 4), values = keys;
    const int64_t query_starts[] = {0, tokens}, starts[] = {3}, tables[] = {0, 1};
    const float slopes[] = {0.5f, 0.25f, 0.125f, 0.0625f};
    AttentionStep step{};
    step.num_tokens = tokens, step.num_sequences = 1, step.n_heads = n_heads, step.n_kv_heads = n_kv_heads;
    step.head_dim = head_dim, step.block_size = block_size, step.keys = keys.data(), step.values = values.data();
    step.query_starts = query_starts, step.starts = starts, step.block_tables = tables, step.table_stride = 2;
    step.slopes = slopes, step.scale = 0.1f, step.window = INT64_MAX;
    layers(both, 2, x.data(), &step, Type::float32, 4 * layer_floats);
}

static void exercise() {
    exercise_choices();
    for (const Type type : {Type::float32, Type::bfloat16, Type::int8})
        for (const int64_t outputs : {1, 16, 70})
            for (const int64_t inputs : {4, 132, 1300}) exercise_matrix(type, outputs, inputs);
    for (const Type type : {Type::float32, Type::bfloat16, Type::int8}) {
        exercise_matrix(type, 70, 4100);  // several blocks of inputs
        exercise_layers(type);
    }
    for (const Type type : {Type::float32, Type::bfloat16, Type::int8})
        for (const int64_t head_dim : {4, 15, 32, 80, 96})
            for (const int64_t n_kv_heads : {1, 2, 4})
                for (const int64_t window : {int64_t(5), INT64_MAX}) exercise_attention(type, head_dim, n_kv_heads, window);
}

int main() {
    if (!prepare()) return puts("the system refuses the registers"), 1;
    set_threads(3);
    std::thread other(exercise);
    exercise();
    set_threads(2);
    other.join();
    puts("exercised every kernel");
}

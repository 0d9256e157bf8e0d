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
    const int64_t most_rows = 2 * MAX_ROWS + 1;
    const std::vector<char> rows(4 * outputs * inputs, 1);
    std::vector<char> packed(packed_bytes(type, outputs, inputs));
    std::vector<float> rounded_scales(outputs);
    const auto scales = numbers(outputs, 1), bias = numbers(outputs, 2), x = numbers(most_rows * inputs, 3);
    const auto residual = numbers(most_rows * outputs, 4);
    const Matrix matrix{packed.data(), type == Type::int8 ? scales.data() : nullptr, outputs, inputs, type};
    for (const Type from : {Type::bfloat16, Type::float32})
        pack(&matrix, rows.data(), type == Type::int8 ? from : type, packed.data(), rounded_scales.data());
    for (int64_t count = 1; count <= most_rows; count++) {
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
    const int64_t block_size = 16, n_heads = 4, counts[] = {1, 7, 1}, starts[] = {150, 0, 3};
    const int64_t tables[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const int64_t query_starts[] = {0, counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]};
    const int64_t tokens = query_starts[3], cached = 12 * n_kv_heads * block_size * (head_dim + 2);
    const auto query = numbers(tokens * n_heads * head_dim, 5), key = numbers(tokens * n_kv_heads * head_dim, 6);
    std::vector<float> context(tokens * n_heads * head_dim), keys(cached), values(cached);
    const float slopes[] = {0.5f, 0.25f, 0.125f, 0.0625f};
    const AttentionStep step{tokens, 3, n_heads, n_kv_heads, head_dim, block_size,
                             n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim,
                             query.data(), key.data(), key.data(), context.data(), keys.data(), values.data(),
                             query_starts, starts, tables, 10, slopes, 0.1f, window};
    attend(&step, type);
}

static void exercise() {
    for (const Type type : {Type::float32, Type::bfloat16, Type::int8})
        for (const int64_t outputs : {1, 16, 70})
            for (const int64_t inputs : {4, 132, 1300}) exercise_matrix(type, outputs, inputs);
    for (const Type type : {Type::float32, Type::bfloat16, Type::int8})
        for (const int64_t head_dim : {4, 32, 80})
            for (const int64_t n_kv_heads : {1, 2, 4})
                for (const int64_t window : {int64_t(5), INT64_MAX}) exercise_attention(type, head_dim, n_kv_heads, window);
}

int main() {
    set_threads(3);
    std::thread other(exercise);
    exercise();
    set_threads(2);
    other.join();
    puts("exercised every kernel");
}

// The library's functions, with C's calling convention. Sizes and pointers are checked by the caller.

#include <memory>
#include <new>
#include <type_traits>

#include "argmax.hpp"
#include "draw.hpp"
#include "layers.hpp"
#include "packing.hpp"

// Never destroyed, because threads may still be computing when the process exits. Each function keeps the pool that it
// started with.
static std::shared_ptr<Pool> &current = *new auto(std::make_shared<Pool>(1));

static std::shared_ptr<Pool> current_pool() { return std::atomic_load(&current); }

// Calls a function; returns whether there was memory for what it computes.
template <class Function>
static int32_t has_memory_for(const Function &function) {
    try {
        function();
    } catch (const std::bad_alloc &) {
        return false;
    }
    return true;
}

// All else is hidden: the variables of one instruction set's templates must not be taken for those of another.
#pragma GCC visibility push(default)
extern "C" {

// Asks the system for what the instruction set needs of it. Returns whether the functions below can be called.
int32_t prepare() {
#if defined(__AMX_TILE__)
    return request_tile_registers();
#else
    return true;
#endif
}

// Sets how many threads share the work of one call, the caller included.
void set_threads(int32_t threads) { std::atomic_store(&current, std::make_shared<Pool>(threads)); }

// The size in bytes of a packed matrix.
int64_t packed_bytes(Type type, int64_t outputs, int64_t inputs) {
    const int64_t item = type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 1;
    return num_panels(outputs) * PANEL * inputs * item;
}

// Packs rows of float32 or bfloat16, of the matrix's type unless that is int8: then they are rounded, and their scales
// written to `scales` [outputs]. packed: what matrix.data points to.
void pack(const Matrix *matrix, const void *rows, Type type, void *packed, float *scales) {
    const auto pool = current_pool();
    with_weights(*matrix, [&](auto *weights) {
        using Weight = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
        const auto pack_as = [&](auto *from) {
            pool->run(num_panels(matrix->outputs), [&](int64_t panel) {
                const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, matrix->outputs - first);
                pack_panel(from + first * matrix->inputs, count, matrix->inputs,
                           static_cast<Weight *>(packed) + first * matrix->inputs,
                           scales == nullptr ? nullptr : scales + first);
            });
        };
        if constexpr (!std::is_same_v<Weight, Int8>)
            pack_as(static_cast<const Weight *>(rows));
        else if (type == Type::bfloat16)
            pack_as(static_cast<const bf16 *>(rows));
        else
            pack_as(static_cast<const float *>(rows));
    });
}

// y = activation(x Wᵀ + bias) + residual, which may be null. Returns whether there was memory for it.
int32_t linear(const Linear *linear, const float *x, int64_t rows, float *y, const float *residual) {
    return has_memory_for([&] { multiply(*linear, x, rows, y, residual, *current_pool()); });
}

// See run_layers. Returns whether there was memory for it.
int32_t layers(const Layer *layers, int64_t count, float *x, const AttentionStep *step, Type cache, int64_t layer_bytes) {
    return has_memory_for([&] { run_layers(layers, count, x, *step, cache, layer_bytes, *current_pool()); });
}

// The rows of the matrix with these numbers.
void embedding(const Matrix *matrix, const int64_t *ids, int64_t count, float *y) {
    const auto pool = current_pool();
    with_weights(*matrix, [&](auto *weights) {
        embed(ids, count, weights, matrix->scales, matrix->inputs, y, *pool);
    });
}

// Layer norm, or RMS norm, of each row of x [rows, size].
void norm(const Norm *norm, const float *x, int64_t rows, int64_t size, float *y) {
    normalize(x, size, rows, size, *norm, y, size, *current_pool());
}

// See argmax.
void argmax_rows(const float *x, int64_t stride, int64_t rows, int64_t size, int64_t *indices, bool *are_finite) {
    argmax(x, stride, rows, size, indices, are_finite, *current_pool());
}

// See draw. Returns whether there was memory for it.
int32_t draw_rows(const DrawOptions *options, int64_t rows, int64_t size, int64_t *tokens) {
    return has_memory_for([&] { draw(options, rows, size, tokens, *current_pool()); });
}

// Attention over a cache of the type.
void attend(const AttentionStep *step, Type cache) { attention(*step, cache, *current_pool()); }
}
#pragma GCC visibility pop

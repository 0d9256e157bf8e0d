// The library's functions, with C's calling convention. Sizes and pointers are checked by the caller.

#include <memory>
#include <new>
#include <type_traits>

#include "attention.hpp"
#include "matmul.hpp"
#include "packing.hpp"
#include "pointwise.hpp"

enum class Type : int32_t { float32, bfloat16, int8 };

// A matrix [outputs, inputs] in packed form. The number of inputs is a multiple of 4.
struct Matrix {
    const void *data;
    const float *scales;  // [outputs], of int8, or null
    int64_t outputs, inputs;
    Type type;
};

// Never destroyed, because threads may still be computing when the process exits. Each function keeps the pool that it
// started with.
static std::shared_ptr<Pool> &current = *new auto(std::make_shared<Pool>(1));

static std::shared_ptr<Pool> current_pool() { return std::atomic_load(&current); }

// Calls a function with the matrix's packed weights.
template <class Function>
static void with_weights(const Matrix &matrix, const Function &function) {
    switch (matrix.type) {
        case Type::float32: return function(static_cast<const float *>(matrix.data));
        case Type::bfloat16: return function(static_cast<const bf16 *>(matrix.data));
        case Type::int8: return function(static_cast<const Int8 *>(matrix.data));
    }
}

template <class Weight>
static void multiply(const float *x, int64_t rows, const Weight *weights, const Matrix &matrix, float *y,
                     const Epilogue &epilogue) {
    const auto pool = current_pool();
#if defined(__AVX512VNNI__) || defined(__AVX2__)
    if constexpr (std::is_same_v<Weight, Int8>)
        return matmul<Integers>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, *pool);
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Weight, bf16>)
        return matmul<Rounded>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, *pool);
#endif
    matmul<Widened<Weight>>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, *pool);
}

// All else is hidden: the variables of one instruction set's templates must not be taken for those of another.
#pragma GCC visibility push(default)
extern "C" {

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

// y = activation(x Wᵀ + bias) + residual; bias and residual may be null.
// Returns whether there was memory for it.
int32_t linear(const Matrix *matrix, const float *x, int64_t rows, float *y, const float *bias, Activation activation,
               float clip, const float *residual) {
    const Epilogue epilogue{matrix->scales, bias, activation, clip, residual};
    try {
        with_weights(*matrix, [&](auto *weights) { multiply(x, rows, weights, *matrix, y, epilogue); });
    } catch (const std::bad_alloc &) {
        return false;
    }
    return true;
}

// The rows of the matrix with these numbers.
void embedding(const Matrix *matrix, const int64_t *ids, int64_t count, float *y) {
    const auto pool = current_pool();
    with_weights(*matrix, [&](auto *weights) {
        embed(ids, count, weights, matrix->scales, matrix->inputs, y, *pool);
    });
}

// Layer norm, or RMS norm, of each row of x [rows, size].
void norm(const float *x, int64_t rows, int64_t size, const float *weight, const float *bias, float eps, int32_t is_rms,
          float *y) {
    const Norm norm{weight, bias, eps, is_rms != 0};
    constexpr int64_t VALUES = 1 << 15;  // in one piece of work
    const int64_t piece = std::max<int64_t>(1, VALUES / size);
    current_pool()->run((rows + piece - 1) / piece, [&](int64_t i) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++)
            normalize(x + row * size, size, norm, y + row * size);
    });
}

// Attention over a cache of the type.
void attend(const AttentionStep *step, Type type) {
    const auto pool = current_pool();
    switch (type) {
        case Type::float32: return attention<float>(*step, *pool);
        case Type::bfloat16: return attention<bf16>(*step, *pool);
        case Type::int8: return attention<int8_t>(*step, *pool);
    }
}
}
#pragma GCC visibility pop

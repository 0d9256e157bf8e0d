// A matrix in packed form, and products with it.
#pragma once

#include <type_traits>

#include "matmul.hpp"

enum class Type : int32_t { float32, bfloat16, int8 };

// [outputs, inputs]; the number of inputs is a multiple of 4.
struct Matrix {
    const void *data;
    const float *scales;  // [outputs], of int8, or null
    int64_t outputs, inputs;
    Type type;
};

// Calls a function with the matrix's packed weights.
template <class Function>
inline void with_weights(const Matrix &matrix, const Function &function) {
    switch (matrix.type) {
        case Type::float32: return function(static_cast<const float *>(matrix.data));
        case Type::bfloat16: return function(static_cast<const bf16 *>(matrix.data));
        case Type::int8: return function(static_cast<const Int8 *>(matrix.data));
    }
}

template <class Weight>
inline void multiply(const Matrix &matrix, const Weight *weights, const float *x, int64_t rows, float *y,
                     const Epilogue &epilogue, Pool &pool) {
#if defined(__AMX_TILE__)
    if constexpr (std::is_same_v<Weight, Int8>)
        return matmul<IntegerTiles>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, pool);
    if constexpr (std::is_same_v<Weight, bf16>)
        return matmul<RoundedTiles>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, pool);
#endif
#if defined(__AVX512VNNI__) || defined(__AVX2__)
    if constexpr (std::is_same_v<Weight, Int8>)
        return matmul<Integers>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, pool);
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Weight, bf16>)
        return matmul<Rounded>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, pool);
#endif
    matmul<Widened<Weight>>(x, rows, weights, matrix.outputs, matrix.inputs, y, epilogue, pool);
}

// A linear layer: y = activation(x Wᵀ + bias), clipped.
struct Linear {
    const Matrix *matrix;
    const float *bias;  // or null
    Activation activation;
    float clip;  // the largest magnitude, or infinity
};

// The residual is added if it is not null; y must be another array.
inline void multiply(const Linear &linear, const float *x, int64_t rows, float *y, const float *residual, Pool &pool) {
    const Matrix &matrix = *linear.matrix;
    const Epilogue epilogue{matrix.scales, linear.bias, linear.activation, linear.clip, residual};
    with_weights(matrix, [&](auto *weights) { multiply(matrix, weights, x, rows, y, epilogue, pool); });
}

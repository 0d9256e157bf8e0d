// Activation functions of the feed-forward network.
#pragma once

#include "vector.hpp"

enum class Activation : int32_t { none, gelu, gelu_tanh, quick_gelu, relu, silu };

inline Floats sigmoid(Floats x) { return 1.f / (1.f + exp(-x)); }

// x Φ(x) with the error function as polynomials fitted by weighted least squares; absolute error below 1e-6.
inline Floats gelu(Floats x) {
    const Floats z = (x < 0.f ? -x : x) * 0.70710678f, square = z * z;
    // erf(z) / z up to 1
    Floats p = splat(7.889109e-05f);
    p = p * square - 8.0208381e-04f;
    p = p * square + 5.1895352e-03f;
    p = p * square - 2.6854444e-02f;
    p = p * square + 1.1283600e-01f;
    p = p * square - 3.7612626e-01f;
    p = p * square + 1.1283791f;
    // -log(erfc(z)) from 1 to 4
    Floats q = splat(2.1687083e-05f);
    q = q * z - 4.4133925e-04f;
    q = q * z + 4.2045764e-03f;
    q = q * z - 2.5208298e-02f;
    q = q * z + 1.0841865e-01f;
    q = q * z + 6.3321984e-01f;
    q = q * z + 1.1295785f;
    q = q * z - 1.8804791e-04f;
    const Floats above = z < 1.f ? 1.f - z * p : z < 4.f ? exp(-q) : Floats{};  // erfc(z)
    return 0.5f * x * (x < 0.f ? above : 2.f - above);
}

inline Floats activate(Activation activation, Floats x) {
    switch (activation) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));
        case Activation::quick_gelu: return x * sigmoid(1.702f * x);
        case Activation::relu: return x < 0.f ? Floats{} : x;  // NaN stays NaN
        case Activation::silu: return x * sigmoid(x);
        default: return x;
    }
}

// Vectors of floats in the width of the instruction set that this file is compiled for, and functions on them.
#pragma once

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

template <class V, class T>
inline V load(const T *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T *to, V v) {
    memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

// a b + c, rounded once where the processor can. The compiler's own choice could differ between the places that must agree.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// sum = a b + sum, rounded as by multiply_add. GCC 12 would move the sums of a loop to other registers and to memory.
inline void add_product(Floats &sum, Floats a, Floats b) {
#if defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum = multiply_add(a, b, sum);
#endif
}

inline Floats as_floats(Words bits) { return (Floats)bits; }

inline Floats load_floats(const float *from) { return load<Floats>(from); }
inline Floats load_floats(const bf16 *from) {
    return as_floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline Floats load_floats(const int8_t *from) {
    // The compiler would convert one lane at a time.
#if defined(__AVX512F__)
    return __builtin_convertvector((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from)), Floats);
#elif defined(__AVX2__)
    return __builtin_convertvector((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)), Floats);
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Shorts), Floats);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Rounds to nearest, ties to even, as torch does. The argument is finite.
inline void store_rounded(float *to, float x) { *to = x; }
inline void store_rounded(bf16 *to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The nearest integer, ties to even, of a number of at most 2^22.
inline float rounded(float x) {
    const float magic = 12582912.f;  // 1.5 x 2^23: adding it rounds
    return (x + magic) - magic;
}

// The lower and the upper half of a vector, combined.
template <class Half, class Whole, class Combine>
inline Half folded(Whole v, const Combine &combine) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    return combine(halves[0], halves[1]);
}

// All lanes, combined pairwise.
template <class Combine>
inline float reduced(Floats v, const Combine &combine) {
    typedef float Quarter __attribute__((vector_size(16)));
#if defined(__AVX__)
    typedef float Half __attribute__((vector_size(32)));
#if defined(__AVX512F__)
    const Half half = folded<Half>(v, combine);
#else
    const Half half = v;
#endif
    const Quarter quarter = folded<Quarter>(half, combine);
#else
    const Quarter quarter = v;
#endif
    return combine(combine(quarter[0], quarter[2]), combine(quarter[1], quarter[3]));
}

inline float sum(Floats v) {
    return reduced(v, [](auto a, auto b) { return a + b; });
}

inline float highest(Floats v) {
    return reduced(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Whether a lane of a comparison is true.
inline bool any(Ints lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX__)
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    uint64_t halves[2];
    memcpy(halves, &lanes, sizeof halves);
    return (halves[0] | halves[1]) != 0;
#endif
}

inline Floats lane_numbers() {
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = float(i);
    return v;
}

// e^x with a relative error below 2e-7; 0 below -87, where float32 has only subnormal numbers.
inline Floats exp(Floats x) {
    const Floats bounded = max(splat(-87.f), min(splat(88.f), x));  // NaN stays NaN
    const Floats magic = splat(12582912.f);  // 1.5 x 2^23: adding it rounds to an integer
    const Floats n = (bounded * 1.44269504f + magic) - magic;
    const Floats r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
    // The Taylor series, which is exact enough for |r| <= ln(2) / 2.
    Floats p = splat(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return x < splat(-87.f) ? Floats{} : p * (Floats)power;
}

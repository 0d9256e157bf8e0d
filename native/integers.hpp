// Products of 8-bit weights with x rounded to integers, with one scale for each GROUP inputs of a row.
#pragma once

#include <algorithm>

#include "dots.hpp"
#include "layout.hpp"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
// The sums of a group are exact. x is packed as [tile][group][scales, sums x -128, inputs / 4][row of the tile].
struct Integers {
    using Packed = int32_t;
    using Shape = VectorShape;
    static constexpr bool NEEDS_ZEROS = true;
#if defined(__AVX512VNNI__)
    using Value = int8_t;
    using Values = Bytes;
    static constexpr int LARGEST = 127;
#else
    using Value = int16_t;  // the instructions take 16 bits, so that rounding x hardly costs accuracy
    using Values = Shorts;
    static constexpr int LARGEST = 32767;
#endif

    const int32_t *x;
    const Int8 *weights;
    int64_t inputs;

    static constexpr int64_t SIDE_WORDS = sizeof(Value);         // of four inputs of a row, in 32 bits
    static constexpr int64_t WORDS = 2 + GROUP / 4 * SIDE_WORDS;  // of a full group and one row

    static int64_t row_words(int64_t inputs) { return inputs / 4 * SIDE_WORDS + 2 * ((inputs + GROUP - 1) / GROUP); }
    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * row_words(inputs); }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        int32_t *to = packed + start * row_words(inputs);
        for (int64_t begin = 0; begin < inputs; begin += GROUP, to += WORDS * height)
            for (int64_t i = 0; i < height; i++)
                pack_group(x + (start + i) * inputs + begin, std::min(GROUP, inputs - begin), to, i, height);
    }

    static void pack_group(const float *x, int64_t count, int32_t *to, int64_t row, int64_t height) {
        Value values[GROUP];
        round_group(x, count, values, to[row], to[height + row]);
        for (int64_t k = 0; k < count; k += 4)
            memcpy(&to[2 * height + (k / 4 * height + row) * SIDE_WORDS], values + k, sizeof(Value) * 4);
    }

    // Rounds the values of a group, and writes the bits of their scale and their sum x -128. Missing values are zeros.
    static void round_group(const float *x, int64_t count, Value (&integers)[GROUP], int32_t &scale_bits, int32_t &correction) {
        float padded[GROUP] = {};
        memcpy(padded, x, 4 * count);
        Floats largest{}, differences{};
        for (int64_t k = 0; k < GROUP; k += LANES) {
            const Floats v = load<Floats>(padded + k);
            largest = max(largest, max(v, -v));
            differences += v - v;  // NaN if a value is not finite
        }
        const float most = highest(largest), scale = most / LARGEST + sum(differences);
        const float inverse = most > 1e-30f && std::isfinite(scale) ? LARGEST / most : 0;
        Ints total{};
        for (int64_t k = 0; k < GROUP; k += LANES) {
            const Floats magic = splat(12582912.f);  // 1.5 x 2^23: adding it rounds to an integer
            const Floats nearest = (load<Floats>(padded + k) * inverse + magic) - magic;
            const Ints values = inverse == 0 ? Ints{} : __builtin_convertvector(nearest, Ints);
            total += values;
            store(integers + k, __builtin_convertvector(values, Values));
        }
        memcpy(&scale_bits, &scale, 4);
        correction = 0;
        for (int i = 0; i < LANES; i++) correction -= 128 * total[i];
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, Fetch fetch, Floats (&sums)[ROWS][PANELS * VECTORS]) const {
        const int32_t *at = x + row * row_words(inputs) + begin / GROUP * WORDS * ROWS;
        const Int8 *w = weights + panel * PANEL * inputs + begin * PANEL;
        for (; begin < end; begin += GROUP, at += WORDS * ROWS, w += GROUP * PANEL) {
            add_group(at, w, std::min(end - begin, GROUP), fetch, sums);
            fetch.from += (fetch.step - 64) * (GROUP * PANEL / 64);
        }
    }

#if defined(__AVX512VNNI__)
    template <int ROWS, int PANELS>
    void add_group(const int32_t *at, const Int8 *w, int64_t count, const Fetch &fetch, Floats (&sums)[ROWS][PANELS]) const {
        const float *scales = reinterpret_cast<const float *>(at);
        Ints dots[ROWS][PANELS];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) dots[i][j] = (Ints)_mm512_set1_epi32(at[ROWS + i]);
        add_dots(at + 2 * ROWS, reinterpret_cast<const uint32_t *>(w), PANEL * inputs / 4, count / 4, fetch, dots);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) sums[i][j] += scales[i] * __builtin_convertvector(dots[i][j], Floats);
    }
#else
    // _mm256_add_epi32(sums, _mm256_madd_epi16(weights, values)), whose sums GCC 12 would keep in memory.
    static __m256i add_products(__m256i sums, __m256i weights, __m256i values) {
        __m256i products;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(weights), "x"(values));
        return sums;
    }

    template <int ROWS, int COLUMNS>
    void add_group(const int32_t *at, const Int8 *w, int64_t count, const Fetch &fetch, Floats (&sums)[ROWS][COLUMNS]) const {
        // The products of two inputs each take two registers for a row and a vector of outputs.
        constexpr int TOGETHER = ROWS <= 3 ? VECTORS : 1;
#pragma GCC unroll 8
        for (int first = 0; first < COLUMNS; first += TOGETHER) {
            const Int8 *lanes = w + first / VECTORS * PANEL * inputs + first % VECTORS * LANES * 4;
            const int32_t *values = at + 2 * ROWS;
            __m256i dots[ROWS][TOGETHER][2] = {};
            const char *fetched = reinterpret_cast<const char *>(lanes) + fetch.from;
            for (int64_t k = 0; k < count; k += 4, lanes += 4 * PANEL, values += 2 * ROWS, fetched += fetch.step) {
                if (first % VECTORS == 0) __builtin_prefetch(fetched);
                __m256i low[TOGETHER], high[TOGETHER];
#pragma GCC unroll 2
                for (int j = 0; j < TOGETHER; j++) {
                    low[j] = _mm256_cvtepu8_epi16(load<__m128i>(lanes + 32 * j));
                    high[j] = _mm256_cvtepu8_epi16(load<__m128i>(lanes + 32 * j + 16));
                }
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    const __m256i four = _mm256_set1_epi64x(load<int64_t>(values + 2 * i));
#pragma GCC unroll 2
                    for (int j = 0; j < TOGETHER; j++) {
                        dots[i][j][0] = add_products(dots[i][j][0], low[j], four);
                        dots[i][j][1] = add_products(dots[i][j][1], high[j], four);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
                for (int j = 0; j < TOGETHER; j++) {
                    const __m256i pairs = _mm256_hadd_epi32(dots[i][j][0], dots[i][j][1]);  // outputs 0 1 4 5 2 3 6 7
                    const Ints whole = (Ints)_mm256_permute4x64_epi64(pairs, 0xd8) + at[ROWS + i];
                    sums[i][first + j] += load<float>(at + i) * __builtin_convertvector(whole, Floats);
                }
        }
    }
#endif
};
#endif

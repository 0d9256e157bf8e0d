// Products of bfloat16 weights with x rounded to bfloat16, two at a time, summed in float32.
#pragma once

#include <algorithm>

#include "dots.hpp"
#include "layout.hpp"
#include "widened.hpp"

#if defined(__AVX512BF16__)
// x is packed as [tile][inputs / 2][row of the tile].
struct Rounded {
    using Packed = int32_t;
    using Shape = VectorShape;
    static constexpr bool NEEDS_ZEROS = true;

    const int32_t *x;
    const bf16 *weights;
    int64_t inputs;

    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * inputs / 2; }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        int32_t *to = packed + start * inputs / 2;
        const float *from = x + start * inputs;
        int64_t k = 0;
        for (; k + 2 * LANES <= inputs; k += 2 * LANES) {
            __m512i rows[LANES];
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; i++) rows[i] = i < height ? pairs(from + i * inputs + k) : __m512i{};
            transpose(rows);
#pragma GCC unroll 16
            for (int64_t j = 0; j < LANES; j++)
                _mm512_mask_storeu_epi32(to + (k / 2 + j) * height, __mmask16((1 << height) - 1), rows[j]);
        }
        for (int64_t i = 0; i < height && k < inputs; i++) {
            float padded[2 * LANES] = {};
            memcpy(padded, from + i * inputs + k, 4 * (inputs - k));
            int32_t last[LANES];
            store(last, pairs(padded));
            for (int64_t j = 0; j < (inputs - k) / 2; j++) to[(k / 2 + j) * height + i] = last[j];
        }
    }

    // The first 32 values of a row, rounded.
    static __m512i pairs(const float *from) {
        return (__m512i)_mm512_cvtne2ps_pbh(load<__m512>(from + LANES), load<__m512>(from));
    }

    // Exchanges rows and columns of 16 words each.
    static void transpose(__m512i (&rows)[LANES]) {
        __m512i half[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 2) {
            half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Of four rows, columns c, c + 4, c + 8 and c + 12 are in the vector 4 * (row / 4) + c.
#pragma GCC unroll 4
        for (int i = 0; i < LANES; i += 4) {
            rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
            rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
            rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
            rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            half[c] = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0x88);
            half[c + 4] = _mm512_shuffle_i32x4(rows[c], rows[c + 4], 0xdd);
            half[c + 8] = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0x88);
            half[c + 12] = _mm512_shuffle_i32x4(rows[c + 8], rows[c + 12], 0xdd);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            rows[c] = _mm512_shuffle_i32x4(half[c], half[c + 8], 0x88);
            rows[c + 8] = _mm512_shuffle_i32x4(half[c], half[c + 8], 0xdd);
            rows[c + 4] = _mm512_shuffle_i32x4(half[c + 4], half[c + 12], 0x88);
            rows[c + 12] = _mm512_shuffle_i32x4(half[c + 4], half[c + 12], 0xdd);
        }
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, const Fetch &fetch, Floats (&sums)[ROWS][PANELS]) const {
        InRegisters<ROWS, PANELS> local(sums);
        add_dots(x + (row * inputs + begin * ROWS) / 2,
                 reinterpret_cast<const uint32_t *>(weights + panel * PANEL * inputs + begin * PANEL),
                 PANEL * inputs / 2, (end - begin) / 2, fetch, local.sums);
        local.copy_to(sums);
    }
};
#endif

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

    const int32_t *x;
    const bf16 *weights;
    int64_t inputs;

    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * inputs / 2; }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        int32_t *to = packed + start * inputs / 2;
        for (int64_t i = 0; i < height; i++)
            for (int64_t k = 0; k < inputs; k += 2 * LANES) {
                const float *from = x + (start + i) * inputs + k;
                const int64_t count = std::min<int64_t>(2 * LANES, inputs - k);
                float padded[2 * LANES] = {};
                if (count < 2 * LANES) from = static_cast<const float *>(memcpy(padded, from, 4 * count));
                int32_t pairs[LANES];
                store(pairs, _mm512_cvtne2ps_pbh(load<__m512>(from + LANES), load<__m512>(from)));
                for (int64_t j = 0; j < count / 2; j++) to[(k / 2 + j) * height + i] = pairs[j];
            }
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, int64_t ahead, Floats (&sums)[ROWS][PANELS]) const {
        InRegisters<ROWS, PANELS> local(sums);
        add_dots(x + (row * inputs + begin * ROWS) / 2,
                 reinterpret_cast<const uint32_t *>(weights + panel * PANEL * inputs + begin * PANEL),
                 PANEL * inputs / 2, (end - begin) / 2, ahead / 2, local.sums);
        local.copy_to(sums);
    }
};
#endif

// Products with float32 x: weights are widened in registers.
#pragma once

#include "layout.hpp"

// The weights of one lane's output for input I of those that lie side by side.
template <int I>
inline Floats widened(Words lanes, const float *) {
    return as_floats(lanes);
}
template <int I>
inline Floats widened(Words lanes, const bf16 *) {
    return as_floats(I == 0 ? lanes << 16 : lanes & 0xffff0000u);
}
template <int I>
inline Floats widened(Words lanes, const Int8 *) {
    return __builtin_convertvector((Ints)((lanes ^ 0x80808080u) << (24 - 8 * I)) >> 24, Floats);
}

// A copy of sums that is only used with constant indices, so that the compiler can keep it in registers.
template <int ROWS, int COLUMNS>
struct InRegisters {
    Floats sums[ROWS][COLUMNS];

    explicit InRegisters(const Floats (&from)[ROWS][COLUMNS]) { copy(from, sums); }
    void copy_to(Floats (&to)[ROWS][COLUMNS]) const { copy(sums, to); }

    static void copy(const Floats (&from)[ROWS][COLUMNS], Floats (&to)[ROWS][COLUMNS]) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) to[i][j] = from[i][j];
    }
};

// x is packed as [tile][input][row of the tile].
template <class Weight>
struct Widened {
    using Packed = float;
    using Shape = VectorShape;
    static constexpr bool NEEDS_ZEROS = true;

    const float *x;
    const Weight *weights;
    int64_t inputs;

    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * inputs; }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, float *packed) {
        float *to = packed + start * inputs;
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t i = 0; i < height; i++) to[k * height + i] = x[(start + i) * inputs + k];
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, const Fetch &fetch, Floats (&sums)[ROWS][PANELS * VECTORS]) const {
        const float *at = x + row * inputs + begin * ROWS;
        const Weight *w = weights + panel * PANEL * inputs + begin * PANEL;
        InRegisters<ROWS, PANELS * VECTORS> local(sums);
        const char *fetched = reinterpret_cast<const char *>(w) + fetch.from;
        for (int64_t k = begin; k < end; k += SIDE<Weight>, at += SIDE<Weight> * ROWS, w += SIDE<Weight> * PANEL) {
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) __builtin_prefetch(fetched + p * PANEL * inputs * int64_t(sizeof(Weight)));
            fetched += fetch.step;
            side<0>(at, w, local.sums);
            if constexpr (SIDE<Weight> > 1) side<1>(at, w, local.sums);
            if constexpr (SIDE<Weight> > 2) side<2>(at, w, local.sums), side<3>(at, w, local.sums);
        }
        local.copy_to(sums);
    }

    template <int I, int ROWS, int COLUMNS>
    void side(const float *at, const Weight *w, Floats (&sums)[ROWS][COLUMNS]) const {
        Floats wide[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++)
            wide[j] = widened<I>(load<Words>(w + j / VECTORS * PANEL * inputs + j % VECTORS * LANES * SIDE<Weight>), w);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Floats value = splat(at[I * ROWS + i]);
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) add_product(sums[i][j], value, wide[j]);
        }
    }
};

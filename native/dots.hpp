// Dot products of AVX-512: one instruction multiplies the inputs that lie side by side in 32 bits and adds them to a sum.
#pragma once

#include "layout.hpp"

#if defined(__AVX512VNNI__)
// For the intrinsics, GCC 12 would copy the sums to other registers and to memory.
inline Ints add_dot(Ints sum, Words weights, Words values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(values));
    return sum;
}

#if defined(__AVX512BF16__)
inline Floats add_dot(Floats sum, Words weights, Words values) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(values));
    return sum;
}
#endif

// Adds the products of ROWS rows with PANELS panels. values: [count][ROWS]; weights: [count][PANEL], of each panel.
template <class Sum, int ROWS, int PANELS>
__attribute__((always_inline)) inline void add_dots(const int32_t *values, const uint32_t *weights, int64_t panel_stride,
                                                    int64_t count, const Fetch &fetch, Sum (&sums)[ROWS][PANELS]) {
    const char *fetched = reinterpret_cast<const char *>(weights) + fetch.from;
    for (; count > 0; count--, values += ROWS, weights += PANEL, fetched += fetch.step) {
        Words lanes[PANELS];
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; j++) {
            __builtin_prefetch(fetched + 4 * j * panel_stride);
            lanes[j] = load<Words>(weights + j * panel_stride);
        }
        // Row by row: the values of all rows together would take the registers of the sums.
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Words value = (Words)_mm512_set1_epi32(values[i]);
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) sums[i][j] = add_dot(sums[i][j], lanes[j], value);
        }
    }
}
#endif

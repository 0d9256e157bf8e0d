// Packs the rows of a matrix, and rounds them to 8 bits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "layout.hpp"

// The scale of a row that is rounded to 8 bits: the largest weight becomes 127. 1 for zeros; NaN if one is not finite.
template <class Row>
inline float scale_of(const Row *row, int64_t inputs) {
    Floats largest{}, differences{};
    for (int64_t k = 0; k < inputs; k += LANES) {
        Row padded[LANES] = {};
        memcpy(padded, row + k, sizeof(Row) * std::min<int64_t>(LANES, inputs - k));
        const Floats v = load_floats(padded);
        largest = max(largest, max(v, -v));
        differences += v - v;
    }
    const float scale = highest(largest) / 127 + sum(differences);
    return scale == 0 ? 1 : scale;
}

template <class Weight>
inline void convert(const Weight *from, int64_t count, float, Weight *to) {
    memcpy(to, from, sizeof(Weight) * count);
}
template <class Row>
inline void convert(const Row *from, int64_t count, float scale, Int8 *to) {
    for (int64_t i = 0; i < count; i++) {
        const float value = to_float(from[i]) / scale;
        to[i].biased = uint8_t(int(value == value ? rounded(value) : 0.f) + 128);
    }
}

// Packs up to PANEL rows; those that are missing become zeros. scales: of the rows, written if they are rounded.
template <class Row, class Weight>
void pack_panel(const Row *rows, int64_t count, int64_t inputs, Weight *packed, float *scales) {
    constexpr bool IS_ROUNDED = std::is_same_v<Weight, Int8>;
    constexpr int64_t WORDS = 16, WIDTH = WORDS * SIDE<Weight>;  // of each row at a time, so that they stay in the cache
    if constexpr (IS_ROUNDED)
        for (int64_t n = 0; n < count; n++) scales[n] = scale_of(rows + n * inputs, inputs);
    for (int64_t k = 0; k < inputs; k += WIDTH) {
        const int64_t width = std::min(WIDTH, inputs - k);
        uint32_t words[PANEL][WORDS] = {};
        for (int64_t n = 0; n < count; n++)
            convert(rows + n * inputs + k, width, IS_ROUNDED ? scales[n] : 1, reinterpret_cast<Weight *>(words[n]));
        char *to = reinterpret_cast<char *>(packed + k * PANEL);
        for (int64_t w = 0; w < width / SIDE<Weight>; w++)
            for (int64_t n = 0; n < PANEL; n++, to += 4) memcpy(to, &words[n][w], 4);
    }
}

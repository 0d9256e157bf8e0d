// Normalization of rows, and rows of an embedding.
#pragma once

#include <algorithm>

#include "layout.hpp"
#include "pool.hpp"

// (x - mean) / sqrt(variance + eps) * weight + bias; the mean and its square are 0 for RMS norm.
struct Norm {
    const float *weight, *bias;  // [size]; the bias may be null
    float eps;
    bool is_rms;
};

inline void normalize(const float *x, int64_t size, const Norm &norm, float *y) {
    // The mean of what `add` adds for each vector; lanes beyond the last value add nothing.
    const auto mean_of = [&](auto add) {
        Floats sums{};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) sums = add(sums, load<Floats>(x + i));
        if (i < size) {
            Floats last{};
            memcpy(&last, x + i, 4 * (size - i));
            const Floats before = sums;
            sums = add(sums, last);
            for (int64_t j = size - i; j < LANES; j++) sums[j] = before[j];
        }
        return sum(sums) / float(size);
    };
    const float mean = norm.is_rms ? 0.f : mean_of([](Floats sums, Floats v) { return sums + v; });
    const float variance =
        mean_of([&](Floats sums, Floats v) { return multiply_add(v - mean, v - mean, sums); });
    const float scale = 1 / std::sqrt(variance + norm.eps);
    for (int64_t i = 0; i < size; i++) {
        const float value = (x[i] - mean) * scale * norm.weight[i];
        y[i] = norm.bias == nullptr ? value : value + norm.bias[i];
    }
}

// Normalizes rows of x, which begin `stride` floats after each other, to y [rows, size].
inline void normalize(const float *x, int64_t stride, int64_t rows, int64_t size, const Norm &norm, float *y,
                      int64_t y_stride, Pool &pool) {
    constexpr int64_t VALUES = 1 << 13;  // in one piece of work
    const int64_t piece = std::max<int64_t>(1, VALUES / size);
    pool.run((rows + piece - 1) / piece, [&](int64_t i) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++)
            normalize(x + row * stride, size, norm, y + row * y_stride);
    });
}

template <class Weight>
void embed(const int64_t *ids, int64_t count, const Weight *weights, const float *scales, int64_t size, float *y,
           Pool &pool) {
    pool.run(count, [&](int64_t row) {
        const int64_t id = ids[row];
        const Weight *panel = weights + id / PANEL * PANEL * size;
        for (int64_t k = 0; k < size; k++) {
            const float value = to_float(panel[packed_index<Weight>(id % PANEL, k)]);
            y[row * size + k] = scales == nullptr ? value : value * scales[id];
        }
    });
}

// The greatest value of each row of logits.
#pragma once

#include <algorithm>
#include <limits>

#include "pool.hpp"
#include "vector.hpp"

struct Maximum {
    int64_t index;   // of the first value that is greatest; any, if there is none above -inf or one is not a number
    bool is_finite;  // whether all values are
};

// The maxima of the lanes of every vector, or of each fourth.
struct Maxima {
    static constexpr float LOWEST = -std::numeric_limits<float>::infinity();

    Floats greatest = splat(LOWEST), differences{};
    Ints places{}, place;  // places: of the greatest values; place: of the next vector

    explicit Maxima(int first) { place = __builtin_convertvector(lane_numbers(), Ints) + first; }

    // checked: as the vector, or 0 where there is no value.
    void add(Floats v, Floats checked, int step) {
        places = v > greatest ? place : places;
        greatest = max(v, greatest);
        differences += checked - checked;  // 0, or not a number where a value is not finite
        place += step;
    }
};

inline Maximum maximum(const float *x, int64_t size) {
    Maxima parts[] = {Maxima(0), Maxima(LANES), Maxima(2 * LANES), Maxima(3 * LANES)};
    constexpr int STEP = 4 * LANES;
    int64_t i = 0;
    for (; i + STEP <= size; i += STEP)
        for (int part = 0; part < 4; part++) {
            const Floats v = load_floats(x + i + part * LANES);
            parts[part].add(v, v, STEP);
        }
    for (int part = 0; i < size; i += LANES, part++) {
        Floats last = splat(Maxima::LOWEST), checked{};
        const auto bytes = 4 * std::min<int64_t>(LANES, size - i);
        memcpy(&last, x + i, bytes), memcpy(&checked, x + i, bytes);
        parts[part].add(last, checked, STEP);
    }
    Maximum result{0, true};
    float best = Maxima::LOWEST;
    for (const Maxima &part : parts) {
        result.is_finite &= sum(part.differences) == 0;
        for (int lane = 0; lane < LANES; lane++) {
            const float value = part.greatest[lane];
            if (value > best || (value == best && part.places[lane] < result.index))
                best = value, result.index = part.places[lane];
        }
    }
    return result;
}

// The index of the maximum of each row of x, which begin `stride` floats after each other, and whether the row is finite.
inline void maxima(const float *x, int64_t stride, int64_t rows, int64_t size, int64_t *indices, bool *are_finite,
                   Pool &pool) {
    constexpr int64_t VALUES = 1 << 15;  // in one piece of work
    const int64_t piece = std::max<int64_t>(1, VALUES / size);
    pool.run((rows + piece - 1) / piece, [&](int64_t i) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++) {
            const Maximum found = maximum(x + row * stride, size);
            indices[row] = found.index, are_finite[row] = found.is_finite;
        }
    });
}

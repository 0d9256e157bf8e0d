// The highest value of each row of logits.
#pragma once

#include <algorithm>
#include <limits>

#include "pool.hpp"
#include "vector.hpp"

struct Highest {
    int64_t index;   // of the first highest value; any, if there is none above -inf or one is not a number
    bool is_finite;  // whether all values are
};

// The highest values of each lane, in every fourth vector.
struct LaneMaxima {
    static constexpr float LOWEST = -std::numeric_limits<float>::infinity();

    Floats highest = splat(LOWEST), differences{};
    Ints places{}, place;  // places: of the highest values; place: of the next vector

    explicit LaneMaxima(int first) { place = __builtin_convertvector(lane_numbers(), Ints) + first; }

    // checked: as the vector, or 0 where there is no value.
    void add(Floats v, Floats checked, int step) {
        places = v > highest ? place : places;
        highest = max(v, highest);
        differences += checked - checked;  // 0, or not a number where a value is not finite
        place += step;
    }
};

inline Highest argmax(const float *x, int64_t size) {
    LaneMaxima parts[] = {LaneMaxima(0), LaneMaxima(LANES), LaneMaxima(2 * LANES), LaneMaxima(3 * LANES)};
    constexpr int STEP = 4 * LANES;
    int64_t i = 0;
    for (; i + STEP <= size; i += STEP)
        for (int part = 0; part < 4; part++) {
            const Floats v = load_floats(x + i + part * LANES);
            parts[part].add(v, v, STEP);
        }
    for (int part = 0; i < size; i += LANES, part++) {
        Floats last = splat(LaneMaxima::LOWEST), checked{};
        const auto bytes = 4 * std::min<int64_t>(LANES, size - i);
        memcpy(&last, x + i, bytes), memcpy(&checked, x + i, bytes);
        parts[part].add(last, checked, STEP);
    }
    Highest result{0, true};
    float best = LaneMaxima::LOWEST;
    for (const LaneMaxima &part : parts) {
        result.is_finite &= sum(part.differences) == 0;
        for (int lane = 0; lane < LANES; lane++) {
            const float value = part.highest[lane];
            if (value > best || (value == best && part.places[lane] < result.index))
                best = value, result.index = part.places[lane];
        }
    }
    return result;
}

// The index of the highest value of each row of x, which begin `stride` floats after each other, and whether the row is finite.
inline void argmax(const float *x, int64_t stride, int64_t rows, int64_t size, int64_t *indices, bool *are_finite,
                   Pool &pool) {
    constexpr int64_t VALUES = 1 << 15;  // in one piece of work
    const int64_t piece = std::max<int64_t>(1, VALUES / size);
    pool.run((rows + piece - 1) / piece, [&](int64_t i) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++) {
            const Highest found = argmax(x + row * stride, size);
            indices[row] = found.index, are_finite[row] = found.is_finite;
        }
    });
}

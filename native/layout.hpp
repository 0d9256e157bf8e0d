// How weights and the rows of x lie in memory for a product.
#pragma once

#include <cstdint>

#include "vector.hpp"

constexpr int PANEL = 16;                  // outputs
constexpr int VECTORS = PANEL / LANES;     // in a panel
constexpr int64_t INPUT_BLOCK = 4096;      // inputs whose weights stay in the cache for several tiles of rows
constexpr int64_t ROW_BLOCK = 96;          // rows of x that stay in the cache for several panels
constexpr int64_t PIECE_BYTES = 64 << 10;  // of weights in one piece of work, at least
constexpr int64_t GROUP = 128;             // inputs that share a scale where x is rounded to 8 bits

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;
#elif defined(__AVX__)
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 3;
#endif
// Panels that are computed together: as many as there are registers for their sums.
constexpr int MAX_PANELS = 4, PANELS_OF_MANY_ROWS = LANES == 16 ? 2 : 1;
constexpr int FEW_ROWS = MAX_ROWS / 3;

// An 8-bit weight plus 128, in units of its output's scale.
struct Int8 {
    uint8_t biased;
};

inline float to_float(Int8 x) { return float(x.biased) - 128.f; }

// How many inputs lie side by side in a panel, so that a 32-bit lane holds the weights of one output for all of them.
template <class Weight>
constexpr int64_t SIDE = 4 / sizeof(Weight);

template <class Weight>
inline int64_t packed_index(int64_t n, int64_t k) {
    return (k / SIDE<Weight> * PANEL + n) * SIDE<Weight> + k % SIDE<Weight>;
}

inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// What is prefetched for each 64 bytes of a panel's weights: `step` bytes, from `from` bytes behind the first of these on.
struct Fetch {
    int64_t from, step;
};

// Rows of x in tiles of up to MAX_ROWS rows of about equal height.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows) : rows(rows), count((rows + MAX_ROWS - 1) / MAX_ROWS) {}
    int64_t start(int64_t tile) const { return tile * rows / count; }
    int height(int64_t tile) const { return int(start(tile + 1) - start(tile)); }
};

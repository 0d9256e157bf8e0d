// How weights and the rows of x lie in memory for a product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.hpp"

constexpr int PANEL = 16;                  // outputs
constexpr int VECTORS = PANEL / LANES;     // in a panel
constexpr int64_t PIECE_BYTES = 64 << 10;  // of weights in one piece of work, at least
constexpr int64_t GROUP = 128;             // inputs that share a scale where x is rounded to 8 bits

// Panels that are computed together: as many as there are registers for their sums.
constexpr int MAX_PANELS = 4, PANELS_OF_MANY_ROWS = LANES == 16 ? 2 : 1;

// The rows of x that are multiplied together where vector registers hold their sums.
struct VectorShape {
#if defined(__AVX512F__)
    static constexpr int MAX_ROWS = 12;
#elif defined(__AVX__)
    static constexpr int MAX_ROWS = 6;
#else
    static constexpr int MAX_ROWS = 3;
#endif
    static constexpr int FEW_ROWS = MAX_ROWS / 3;  // with MAX_PANELS
    static constexpr int ROW_STEP = 1;             // between the numbers of rows that code is compiled for
    static constexpr int64_t INPUT_BLOCK = 4096;   // inputs whose weights stay in the cache for several tiles of rows
    static constexpr int64_t ROW_BLOCK = 96;       // rows of x that stay in the cache for several panels
    struct Context {};                             // lives as long as there are sums in registers
};

// An 8-bit weight plus 128, in units of its output's scale.
struct Int8 {
    uint8_t biased;
};

inline float to_float(Int8 x) { return float(x.biased) - 128.f; }

// Memory that begins with a line of the processor's cache: a vector across two lines takes two loads.
struct alignas(64) Line {
    char bytes[64];
};
inline int64_t num_lines(int64_t bytes) { return (bytes + 63) / 64; }

// How many inputs lie side by side in a panel, so that a 32-bit lane holds the weights of one output for all of them.
template <class Weight>
constexpr int64_t SIDE = 4 / sizeof(Weight);

template <class Weight>
inline int64_t packed_index(int64_t n, int64_t k) {
    return (k / SIDE<Weight> * PANEL + n) * SIDE<Weight> + k % SIDE<Weight>;
}

inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// What is prefetched during a product: for each 64 bytes of a panel's weights, `step` bytes, from `from` bytes behind the first
// of these on; and the vectors of y and of the residual that are needed when the sums are complete.
struct Fetch {
    int64_t from, step;
    const float *y = nullptr, *residual = nullptr;
    int64_t stride = 0, vector = 0, vectors = 0;  // of both: floats from row to row; the next vector, and behind the last one

    // Prefetches the next vector. A row has COLUMNS of them.
    template <int COLUMNS>
    void next_vector() {
        if (vector == vectors) return;
        const int64_t at = vector / COLUMNS * stride + vector % COLUMNS * LANES;
        __builtin_prefetch(y + at);
        __builtin_prefetch(residual + at);
        vector++;
    }
};

// Rows of x in tiles of up to `most` rows of about equal height, which is a multiple of `step` for all but the last.
struct Tiles {
    int64_t rows, count, size;
    Tiles(int64_t rows, int64_t most, int64_t step) : rows(rows), count((rows + most - 1) / most) {
        size = ((rows + count - 1) / std::max<int64_t>(1, count) + step - 1) / step * step;
    }
    int64_t start(int64_t tile) const { return std::min(rows, tile * size); }
    int height(int64_t tile) const { return int(start(tile + 1) - start(tile)); }
};

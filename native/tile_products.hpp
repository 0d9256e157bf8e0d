// Products by AMX with packed weights.
//
// A register of weights is 1 KiB of a panel as it lies in memory; a register of x, 16 rows of it. What is missing of either
// becomes zeros, so that registers always have their full size.
#pragma once

#include <algorithm>

#include "integers.hpp"
#include "rounded.hpp"
#include "tile_registers.hpp"

#if defined(__AMX_TILE__)
struct TileShape {
    static constexpr int ROW_STEP = REGISTER_ROWS, MAX_ROWS = 2 * REGISTER_ROWS, FEW_ROWS = REGISTER_ROWS;
    static constexpr int64_t INPUT_BLOCK = 2048, ROW_BLOCK = 128;
    struct Context : TileRegisters {
        Context() : TileRegisters(TileSizes{}) {}
    };
};

// The sums of BLOCKS x 16 rows of x and PANELS panels, in the registers 0 to 3; 4 and 5 are for x, 6 and 7 for weights.
template <class Weight, int BLOCKS, int PANELS>
struct TileSums {
    static_assert(BLOCKS <= 2 && BLOCKS * PANELS <= 4);
    static constexpr int64_t STRIDE = PANELS * 64;  // of the sums in memory: [BLOCKS * 16][PANELS * 16]

    static void clear() {
        for_each<BLOCKS * PANELS>([](auto sum) { clear_register<sum>(); });
    }

    static void load(const void *from) {
        for_each<BLOCKS * PANELS>([&](auto sum) { load_register<sum>(static_cast<const char *>(from) + at(sum), STRIDE); });
    }

    static void store(void *to) {
        for_each<BLOCKS * PANELS>([&](auto sum) { store_register<sum>(static_cast<char *>(to) + at(sum), STRIDE); });
    }

    static constexpr int64_t at(int sum) { return sum / PANELS * REGISTER_ROWS * STRIDE + sum % PANELS * 64; }

    // Adds the products of `count` registers for each block, x_stride bytes apart, and panel.
    static void add(const char *x, int64_t x_stride, const char *weights, int64_t panel_stride, int64_t count,
                    Fetch &fetch) {
        const char *fetched = weights + fetch.from;
        float busy = 0;
        for (; count > 0; count--, x += REGISTER_BYTES, weights += REGISTER_BYTES, fetched += 16 * fetch.step) {
            for (int64_t i = 0; i < 16 * fetch.step; i += 64)
                for (int j = 0; j < PANELS; j++) __builtin_prefetch(fetched + i + j * panel_stride);
            fetch.next_vector<PANELS>();
            // Units for floats that have nothing to do are turned off, and the next store of a register waits for them.
            asm volatile("vaddss %0, %0, %0" : "+x"(busy));
            for_each<BLOCKS>([&](auto block) { load_register<4 + block>(x + block * x_stride, 64); });
            for_each<PANELS>([&](auto panel) {
                load_register<6 + panel % 2>(weights + panel * panel_stride, 64);
                for_each<BLOCKS>([&](auto block) {
                    add_products<block * PANELS + panel, 4 + block, 6 + panel % 2>(Weight{});
                });
            });
        }
    }

    // Adds the products of the last inputs, of which there are not enough for a register.
    static void add_last(const char *x, int64_t x_stride, const char *weights, int64_t panel_stride, int64_t bytes) {
        char padded[PANELS][REGISTER_BYTES] = {};
        for (int j = 0; j < PANELS; j++) memcpy(padded[j], weights + j * panel_stride, bytes);
        Fetch none{0, 0};
        add(x, x_stride, padded[0], REGISTER_BYTES, 1, none);
    }
};

// bfloat16, as Rounded. x is packed as [16 rows][32 inputs][row][input].
struct RoundedTiles {
    using Packed = int32_t;
    using Shape = TileShape;
    static constexpr bool NEEDS_ZEROS = false;
    static constexpr int64_t INPUTS = 32;  // of a register

    const int32_t *x;
    const bf16 *weights;
    int64_t inputs;

    static int64_t row_words(int64_t inputs) { return (inputs + INPUTS - 1) / INPUTS * 16; }
    static int64_t packed_size(int64_t rows, int64_t inputs) {
        return (rows + REGISTER_ROWS - 1) / REGISTER_ROWS * REGISTER_ROWS * row_words(inputs);
    }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        for (int64_t block = 0; block < height; block += REGISTER_ROWS) {
            int32_t *const to = packed + (start + block) * row_words(inputs);
            for (int64_t i = 0; i < REGISTER_ROWS; i++)
                for (int64_t k = 0; k < inputs; k += INPUTS) {
                    const float *from = x + (start + block + i) * inputs + k;
                    float padded[INPUTS] = {};
                    const bool is_whole = k + INPUTS <= inputs && block + i < height;
                    if (!is_whole && block + i < height) memcpy(padded, from, 4 * (inputs - k));
                    store(to + k / INPUTS * 256 + i * 16, Rounded::pairs(is_whole ? from : padded));
                }
        }
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, Fetch fetch, Floats (&sums)[ROWS][PANELS]) const {
        using Sums = TileSums<bf16, ROWS / REGISTER_ROWS, PANELS>;
        const auto *at = reinterpret_cast<const char *>(x + row * row_words(inputs) + begin / INPUTS * 256);
        const auto *w = reinterpret_cast<const char *>(weights + panel * PANEL * inputs + begin * PANEL);
        const int64_t x_stride = REGISTER_ROWS * row_words(inputs) * 4, panel_stride = PANEL * inputs * 2;
        const int64_t whole = (end - begin) / INPUTS, last = (end - begin) % INPUTS;
        if (begin == 0)
            Sums::clear();
        else
            Sums::load(sums);
        Sums::add(at, x_stride, w, panel_stride, whole, fetch);
        if (last > 0)
            Sums::add_last(at + whole * REGISTER_BYTES, x_stride, w + whole * REGISTER_BYTES, panel_stride,
                           last * PANEL * 2);
        Sums::store(sums);
    }
};

// 8-bit weights, as Integers: with the same bits. x is packed as [16 rows][group][scales, sums x -128, inputs / 64][row][input].
struct IntegerTiles {
    using Packed = int32_t;
    using Shape = TileShape;
    static constexpr bool NEEDS_ZEROS = true;
    static constexpr int64_t REGISTERS = GROUP / 64;  // of a group
    static constexpr int64_t GROUP_WORDS = 2 * REGISTER_ROWS + REGISTERS * REGISTER_BYTES / 4;  // of 16 rows

    const int32_t *x;
    const Int8 *weights;
    int64_t inputs;

    static int64_t block_words(int64_t inputs) { return (inputs + GROUP - 1) / GROUP * GROUP_WORDS; }
    static int64_t packed_size(int64_t rows, int64_t inputs) {
        return (rows + REGISTER_ROWS - 1) / REGISTER_ROWS * block_words(inputs);
    }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        for (int64_t block = 0; block < height; block += REGISTER_ROWS) {
            int32_t *to = packed + (start + block) / REGISTER_ROWS * block_words(inputs);
            for (int64_t begin = 0; begin < inputs; begin += GROUP, to += GROUP_WORDS) {
                std::fill_n(to, GROUP_WORDS, 0);
                for (int64_t i = 0; i < std::min(REGISTER_ROWS, height - block); i++) {
                    const float *from = x + (start + block + i) * inputs + begin;
                    int8_t values[GROUP];
                    Integers::round_group(from, std::min(GROUP, inputs - begin), values, to[i], to[REGISTER_ROWS + i]);
                    for (int64_t r = 0; r < REGISTERS; r++)
                        memcpy(to + 2 * REGISTER_ROWS + r * 256 + i * 16, values + r * 64, 64);
                }
            }
        }
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, Fetch fetch, Floats (&sums)[ROWS][PANELS]) const {
        using Sums = TileSums<Int8, ROWS / REGISTER_ROWS, PANELS>;
        const int64_t stride = block_words(inputs), panel_stride = PANEL * inputs;
        const int32_t *at = x + row / REGISTER_ROWS * stride + begin / GROUP * GROUP_WORDS;
        const auto *w = reinterpret_cast<const char *>(weights + panel * PANEL * inputs + begin * PANEL);
        for (; begin < end; begin += GROUP, at += GROUP_WORDS, w += GROUP * PANEL) {
            const auto *values = reinterpret_cast<const char *>(at + 2 * REGISTER_ROWS);
            const int64_t count = std::min(GROUP, end - begin), whole = count / 64, last = count % 64;
            Sums::clear();
            Sums::add(values, 4 * stride, w, panel_stride, whole, fetch);
            if (last > 0)
                Sums::add_last(values + whole * REGISTER_BYTES, 4 * stride, w + whole * REGISTER_BYTES, panel_stride,
                               last * PANEL);
            fetch.from += (fetch.step - 64) * (GROUP * PANEL / 64);
            Ints dots[ROWS][PANELS];
            Sums::store(dots);
            for (int i = 0; i < ROWS; i++) {
                const int32_t *of_row = at + i / REGISTER_ROWS * stride + i % REGISTER_ROWS;
                const Floats scale = splat(load<float>(of_row));
                for (int j = 0; j < PANELS; j++)
                    sums[i][j] += scale * __builtin_convertvector(dots[i][j] + of_row[REGISTER_ROWS], Floats);
            }
        }
    }
};
#endif

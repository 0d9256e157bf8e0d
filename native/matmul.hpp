// y = activation(x Wᵀ + bias) + residual, for packed weights W.
//
// `Products` says how the rows of x are packed and multiplied; NEEDS_ZEROS, whether its sums begin as zeros in memory.
//
// Weights are packed in panels of 16 outputs, so that a vector holds the weights of several outputs for the same
// inputs. Each output is one chain of additions over the inputs in a fixed order: its bits depend on its own row of x and
// on the instruction set, not on the other rows or the number of threads.
#pragma once

#include <algorithm>
#include <memory>

#include "activation.hpp"
#include "integers.hpp"
#include "pool.hpp"
#include "rounded.hpp"
#include "tile_products.hpp"
#include "widened.hpp"

// How an output is finished.
struct Epilogue {
    const float *scales;  // [outputs], of 8-bit weights, or null
    const float *bias;    // [outputs] or null
    Activation activation;
    float clip;             // the largest magnitude, or infinity
    const float *residual;  // [rows, outputs] or null
};

template <class Products>
struct Matmul {
    using Shape = typename Products::Shape;

    Products products;
    Tiles tiles;
    int64_t outputs;
    float *y;  // [rows, outputs]; holds the sums over the first inputs while the others are missing
    Epilogue epilogue;

    // Adds the inputs [begin, end) for one tile of up to ROWS rows and PANELS panels.
    template <int ROWS, int PANELS>
    void add(int64_t tile, int64_t panel, int64_t begin, int64_t end, const Fetch &fetch) const {
        alignas(64) Floats sums[ROWS][PANELS * VECTORS];
        const int64_t row = tiles.start(tile);
        const int height = Shape::ROW_STEP == 1 ? ROWS : std::min(ROWS, tiles.height(tile));
        const int64_t first = panel * PANEL, columns = std::min<int64_t>(PANELS * PANEL, outputs - first);
        float *out = y + row * outputs + first;
        if (Products::NEEDS_ZEROS && (begin == 0 || height < ROWS))
            for (auto &row_sums : sums) std::fill(std::begin(row_sums), std::end(row_sums), Floats{});
        if (begin > 0)
            for (int i = 0; i < height; i++)
                for (int j = 0; j < PANELS * VECTORS; j++) sums[i][j] = load_columns(out + i * outputs, columns, j * LANES);
        // Behind the end of a panel is the one beside it, which has been read: the last inputs fetch the panels after these.
        // With the 16 registers of AVX2, GCC 12 compiles such a loop to one that takes 60% longer.
        constexpr int64_t item = sizeof(*products.weights);
        const int64_t skipped = (PANELS - 1) * PANEL * products.inputs * item;
        int64_t turn = end;
        if (LANES == 16 && fetch.step == 64) turn = (end - fetch.from / (PANEL * item)) / GROUP * GROUP;
        if (turn <= begin) turn = end;
        const bool has_residual = end == products.inputs && epilogue.residual != nullptr;
        const float *residual = has_residual ? epilogue.residual + (out - y) : out;
        Fetch current{fetch.from, fetch.step, out, residual, outputs, 0, height * PANELS * VECTORS};
        for (int64_t at = begin, to = turn; at < end; at = to, to = end) {
            products.template add<ROWS, PANELS>(row, panel, at, to, current, sums);
            current = {fetch.from + skipped, fetch.step};
        }
        if (end < products.inputs) {
            for (int i = 0; i < height; i++)
                for (int j = 0; j < PANELS * VECTORS; j++) store_columns(out + i * outputs, columns, j * LANES, sums[i][j]);
        } else if (columns == PANELS * PANEL) {
            finish(row, first, height, PANELS * PANEL, sums);
        } else {
            finish(row, first, height, columns, sums);
        }
    }

    // Inlined, as are the functions below, so that whole vectors are stored without a branch.
    template <int ROWS, int COLUMNS>
    __attribute__((always_inline)) void finish(int64_t row, int64_t first, int height, int64_t columns,
                                               const Floats (&sums)[ROWS][COLUMNS]) const {
        for (int j = 0; j < COLUMNS; j++) {
            const int64_t from = j * LANES;
            const Floats scale = epilogue.scales == nullptr ? Floats{} : load_columns(epilogue.scales + first, columns, from);
            const Floats bias = epilogue.bias == nullptr ? Floats{} : load_columns(epilogue.bias + first, columns, from);
            for (int i = 0; i < height; i++) {
                const int64_t at = (row + i) * outputs + first;
                Floats value = epilogue.scales == nullptr ? sums[i][j] + bias : multiply_add(sums[i][j], scale, bias);
                value = activate(epilogue.activation, value);
                if (epilogue.clip < INFINITY) {  // NaN stays NaN
                    value = value > epilogue.clip ? splat(epilogue.clip) : value;
                    value = value < -epilogue.clip ? splat(-epilogue.clip) : value;
                }
                if (epilogue.residual != nullptr) value += load_columns(epilogue.residual + at, columns, from);
                store_columns(y + at, columns, from, value);
            }
        }
    }

    // Load and store a vector of a row that may extend beyond the row's last column.
    __attribute__((always_inline)) static Floats load_columns(const float *row, int64_t columns, int64_t at) {
        if (at + LANES <= columns) return load<Floats>(row + at);
        Floats v{};
        if (at < columns) memcpy(&v, row + at, 4 * (columns - at));
        return v;
    }
    __attribute__((always_inline)) static void store_columns(float *row, int64_t columns, int64_t at, const Floats &v) {
        if (at + LANES <= columns) return store(row + at, v);
        if (at < columns) memcpy(row + at, &v, 4 * (columns - at));
    }

    template <int PANELS, int ROWS = PANELS == MAX_PANELS ? Shape::FEW_ROWS : Shape::MAX_ROWS>
    void add_tile(int64_t tile, int64_t panel, int64_t begin, int64_t end, const Fetch &fetch) const {
        constexpr int FEWER = ROWS - Shape::ROW_STEP;
        if (tiles.height(tile) > FEWER) return add<ROWS, PANELS>(tile, panel, begin, end, fetch);
        if constexpr (FEWER > 0) add_tile<PANELS, FEWER>(tile, panel, begin, end, fetch);
    }

    // One tile of rows prefetches what it reads soon. Of several, each prefetches its share of what all of them read next,
    // so that memory is read at the same rate all the time.
    template <int PANELS>
    Fetch fetch(int64_t tile, int64_t count, int64_t block) const {
        constexpr int64_t item = sizeof(*products.weights);
        if (count == 1) return {PANELS == MAX_PANELS ? 2048 : 4096, 64};
        return {PANEL * (PANELS * products.inputs + block * tile / count) * item, 64 / count};
    }

    template <int PANELS>
    void add_panels(int64_t panel, int64_t last, int64_t tile, int64_t last_tile, int64_t begin, int64_t end) const {
        for (; panel + PANELS <= last; panel += PANELS)
            for (int64_t t = tile; t < last_tile; t++)
                add_tile<PANELS>(t, panel, begin, end, fetch<PANELS>(t - tile, last_tile - tile, end - begin));
        if constexpr (PANELS > 1)
            if (panel < last) add_panels<PANELS / 2>(panel, last, tile, last_tile, begin, end);
    }

    // Computes the rows of the tiles [tile, last_tile) and the outputs of the panels [panel, last).
    void compute(int64_t panel, int64_t last, int64_t tile, int64_t last_tile) const {
        [[maybe_unused]] const typename Shape::Context context{};
        const int64_t block = tiles.count == 1 ? products.inputs : Shape::INPUT_BLOCK;
        for (int64_t begin = 0; begin < products.inputs; begin += block) {
            const int64_t end = std::min(products.inputs, begin + block);
            if (tiles.rows <= Shape::FEW_ROWS)
                add_panels<MAX_PANELS>(panel, last, tile, last_tile, begin, end);
            else
                add_panels<PANELS_OF_MANY_ROWS>(panel, last, tile, last_tile, begin, end);
        }
    }
};

template <class Products, class Weight>
void matmul(const float *x, int64_t rows, const Weight *weights, int64_t outputs, int64_t inputs, float *y,
            const Epilogue &epilogue, Pool &pool) {
    using Packed = typename Products::Packed;
    using Shape = typename Products::Shape;
    static thread_local std::unique_ptr<Line[]> packed;
    static thread_local int64_t capacity = 0;
    if (const int64_t size = num_lines(Products::packed_size(rows, inputs) * sizeof(Packed)); size > capacity)
        capacity = 0, packed.reset(), packed.reset(new Line[size]), capacity = size;
    Packed *const to = reinterpret_cast<Packed *>(packed.get());
    const Tiles tiles(rows, Shape::MAX_ROWS, Shape::ROW_STEP);
    pool.run(tiles.count, [&](int64_t i) { Products::pack(x, inputs, tiles.start(i), tiles.height(i), to); });
    const Matmul<Products> product{{to, weights, inputs}, tiles, outputs, y, epilogue};
    constexpr int64_t MOST = Shape::ROW_BLOCK / Shape::MAX_ROWS;  // tiles in a block of rows; all have about as many
    const int64_t panels = num_panels(outputs), blocks = (tiles.count + MOST - 1) / MOST;
    const int64_t panel_bytes = PANEL * inputs * int64_t(sizeof(Weight));
    // About eight pieces for each thread, unless they become too small; of a multiple of MAX_PANELS. Blocks of rows follow
    // each other, so that all threads read the same weights.
    int64_t size = std::max(panels * blocks / (8 * pool.size()), PIECE_BYTES / panel_bytes);
    size = std::max<int64_t>(1, size / MAX_PANELS) * MAX_PANELS;
    pool.run((panels + size - 1) / size * blocks, [&](int64_t i) {
        const int64_t panel = i / blocks * size, block = i % blocks;
        product.compute(panel, std::min(panels, panel + size), tiles.count * block / blocks, tiles.count * (block + 1) / blocks);
    });
}

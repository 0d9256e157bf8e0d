// Products of a few queries with keys, and of their weights with values, in vector registers.
#pragma once

#include <algorithm>

#include "cache.hpp"
#include "widened.hpp"

// For up to QUERIES queries, a power of 2, which share the reading of a key or value. Queries: [head_dim / SIDE][query][SIDE];
// sums: [vectors][query].
template <class Kind>
struct VectorAttention {
    using Items = Kind;
    using Stored = typename Items::Stored;
    using Number = typename Items::Number;
    using Lanes = typename Items::Lanes;
    using Tile = typename Cache<Items>::Tile;
    using Span = typename Cache<Items>::Span;
    struct Context {};
    static constexpr int64_t SIDE = Items::SIDE;
    static constexpr bool IS_SCALED = Cache<Items>::IS_SCALED;
    static constexpr int QUERIES = LANES == 16 ? 8 : 4;

    const AttentionStep &step;

    static int64_t group_size(int64_t remaining) {
        int64_t size = QUERIES;
        while (size > remaining) size /= 2;
        return size;
    }
    static int64_t query_place(int64_t dimension, int64_t query, int64_t count) { return dimension * count + query * SIDE; }
    static int64_t sum_place(int64_t vector, int64_t query, int64_t count, int64_t) { return vector * count + query; }

    // Calls a function with the number of queries as a constant.
    template <class Function>
    static void with_count(int64_t count, const Function &function) {
        switch (count) {
            case 1: return function(std::integral_constant<int, 1>{});
            case 2: return function(std::integral_constant<int, 2>{});
            case 4: return function(std::integral_constant<int, 4>{});
            default: return function(std::integral_constant<int, QUERIES>{});
        }
    }

    // Writes the products of the queries with the keys of a span's first tiles.
    void score(const Number *queries, int64_t count, const Span &span, int64_t num_tiles, float (*weights)[SPAN]) const {
        with_count(count, [&](auto constant) {
            // As many tiles together as there are registers for their sums.
            constexpr int COUNT = constant, TOGETHER = std::max(1, int(8 * SIDE) / (COUNT * TILE_VECTORS));
            score_all<COUNT, TOGETHER>(queries, span.tiles, 0, num_tiles, weights);
        });
    }

    // Adds the products of the weights of a span's first tokens with their values. next: what is read next.
    void add(const float (*weights)[SPAN], int64_t count, const Span &span, const Span &next, int64_t length,
             Floats *sums) const {
        with_count(count, [&](auto constant) {
            constexpr int COUNT = constant, TOGETHER = LANES == 16 ? std::min(4, 16 / COUNT) : 2;
            const int64_t vectors = (step.head_dim + LANES - 1) / LANES;
            int64_t v = 0;
            for (; (v + TOGETHER) * LANES <= step.head_dim; v += TOGETHER)
                add_values<COUNT, TOGETHER>(v, span, next, length, weights, &sums[v * COUNT]);
            for (; v < vectors; v++) add_values<COUNT, 1>(v, span, next, length, weights, &sums[v * COUNT]);
        });
    }

   private:
    static const Number *numbers(const float *weights) { return reinterpret_cast<const Number *>(weights); }

    // Scores the tiles [first, last), TILES together as long as there are as many.
    template <int COUNT, int TILES>
    void score_all(const Number *queries, const Tile *tiles, int64_t first, int64_t last, float (*weights)[SPAN]) const {
        for (; first + TILES <= last; first += TILES)
            score<COUNT, TILES>(queries, tiles + first, weights, first * TILE);
        if constexpr (TILES > 1)
            if (first < last) score_all<COUNT, TILES / 2>(queries, tiles, first, last, weights);
    }

    // The products of the queries with the keys of some tiles, summed over the dimensions in their order, from
    // weights[query][at] on.
    template <int COUNT, int TILES>
    void score(const Number *queries, const Tile *tiles, float (*weights)[SPAN], int64_t at) const {
        Floats sums[TILES * TILE_VECTORS][COUNT]{};
        const Stored *from[TILES];
        for (int t = 0; t < TILES; t++) from[t] = tiles[t].keys;
        for (int64_t i = 0; i < step.head_dim; i += SIDE) {
#pragma GCC unroll 8
            for (int t = 0; t < TILES; t++) {
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) {
                    const Lanes keys = Items::load_lanes(from[t] + v * LANES * SIDE);
#pragma GCC unroll 8
                    for (int q = 0; q < COUNT; q++) {
                        Floats &sum = sums[t * TILE_VECTORS + v][q];
                        sum = Items::add(sum, keys, queries + i * COUNT + q * SIDE);
                    }
                }
                from[t] += step.block_size * SIDE;
                if (i * TILE % (64 / sizeof(Stored)) == 0) __builtin_prefetch(tiles[t].values + i * TILE);
            }
        }
        for (int t = 0; t < TILES; t++) {
            for (int v = 0; v < TILE_VECTORS; v++) {
                [[maybe_unused]] Floats scale{};
                if constexpr (IS_SCALED) scale = load_floats(tiles[t].key_scales + v * LANES);
                for (int q = 0; q < COUNT; q++) {
                    Floats sum = sums[t * TILE_VECTORS + v][q];
                    if constexpr (IS_SCALED) sum *= scale;
                    store(&weights[q][at + t * TILE + v * LANES], sum);
                }
            }
        }
    }

    // Adds the products of the weights with N vectors of the values, from the vector `first` on.
    template <int COUNT, int N>
    void add_values(int64_t first, const Span &span, const Span &next, int64_t length, const float (*weights)[SPAN],
                    Floats *sums) const {
        Floats(&all)[N][COUNT] = *reinterpret_cast<Floats(*)[N][COUNT]>(sums);
        InRegisters<N, COUNT> context(all);
        const int64_t begin = first * LANES * SIDE, stride = step.head_dim * SIDE;
        const bool is_whole = (first + N) * LANES <= step.head_dim;  // false for one vector at most
        for (int64_t tile = 0; tile * TILE < length; tile++) {
            const Stored *values = span.tiles[tile].values + begin;
            // The keys at the same place in the next span: blocks are scattered, so the hardware does not predict them.
            const Stored *fetched = tile < next.num_tiles ? next.tiles[tile].keys + begin : values;
            for (int64_t t = tile * TILE; t < std::min(length, (tile + 1) * TILE); t += SIDE) {
#pragma GCC unroll 8
                for (int v = 0; v < N; v++) {
                    const Lanes lanes = is_whole ? Items::load_lanes(values + v * LANES * SIDE) : load_some(values);
                    __builtin_prefetch(fetched + v * LANES * SIDE);
#pragma GCC unroll 8
                    for (int q = 0; q < COUNT; q++)
                        context.sums[v][q] = Items::add(context.sums[v][q], lanes, numbers(weights[q]) + t);
                }
                values += stride, fetched += stride;
            }
        }
        context.copy_to(all);
    }

    // The vector that is partly beyond the dimensions.
    __attribute__((noinline)) Lanes load_some(const Stored *from) const {
        Stored padded[LANES * SIDE] = {};
        memcpy(padded, from, step.head_dim % LANES * SIDE * sizeof(Stored));
        return Items::load_lanes(padded);
    }
};

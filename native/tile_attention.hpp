// Products of up to 16 queries with keys, and of their weights with values, by AMX.
//
// A tile of the cache has 16 tokens. Each row of its keys is a pair of dimensions of all tokens, and each row of its values
// all dimensions of a pair of tokens, as the registers need them.
#pragma once

#include <algorithm>

#include "cache.hpp"
#include "tile_registers.hpp"

#if defined(__AMX_TILE__)
// Queries: [head_dim / 32][query][32]; sums: [query][head_dim].
struct TileAttention {
    using Items = PairedItems;
    using Span = Cache<Items>::Span;
    static constexpr int QUERIES = REGISTER_ROWS;
    static constexpr int64_t DIMENSIONS = 32;  // of a register of queries or keys
    static constexpr int64_t SPAN_BYTES = SPAN * sizeof(float);

    // 0 to 3 hold sums, 4 queries, 5 keys, 6 the weights of 16 tokens, 7 their values.
    class Context : TileRegisters {
       public:
        ~Context() { rows = 0; }

        // Sizes the registers for a number of queries.
        static void use(int64_t count) {
            if (count == rows) return;
            rows = count;
            TileSizes sizes;
            for (const int sums_or_queries : {0, 1, 2, 3, 4, 6}) sizes.rows[sums_or_queries] = uint8_t(count);
            sizes.row_bytes[6] = 32;
            sizes.rows[7] = 8;
            resize(sizes);
        }

       private:
        static inline thread_local int64_t rows = 0;
    };

    const AttentionStep &step;

    static bool can_compute(const AttentionStep &step) { return step.head_dim % DIMENSIONS == 0; }

    static int64_t group_size(int64_t remaining) { return std::min<int64_t>(QUERIES, remaining); }
    static int64_t query_place(int64_t dimension, int64_t query, int64_t count) {
        return (dimension / DIMENSIONS * count + query) * DIMENSIONS + dimension % DIMENSIONS;
    }
    static int64_t sum_place(int64_t vector, int64_t query, int64_t, int64_t vectors) { return query * vectors + vector; }

    // Writes the products of the queries with the keys of a span's first tiles.
    void score(const bf16 *queries, int64_t count, const Span &span, int64_t num_tiles, float (*weights)[SPAN]) const {
        Context::use(count);
        int64_t tile = 0;
        for (; tile + 4 <= num_tiles; tile += 4) score_tiles<4>(queries, count, span, tile, weights);
        for (; tile < num_tiles; tile++) score_tiles<1>(queries, count, span, tile, weights);
    }

    template <int TILES>
    void score_tiles(const bf16 *queries, int64_t count, const Span &span, int64_t tile, float (*weights)[SPAN]) const {
        for_each<TILES>([](auto sum) { clear_register<sum>(); });
        const int64_t stride = step.block_size * 4;  // between pairs of dimensions
        for (int64_t d = 0; d < step.head_dim; d += DIMENSIONS) {
            load_register<4>(bytes(queries + d * count), 64);
            for_each<TILES>([&](auto t) {
                load_register<5>(bytes(span.tiles[tile + t].keys + d * step.block_size), stride);
                add_products<t, 4, 5>(bf16{});
                fetch(span.tiles[tile + t].values + d * TILE);
            });
        }
        for_each<TILES>([&](auto t) {
            store_register<t>(reinterpret_cast<char *>(&weights[0][(tile + t) * TILE]), SPAN_BYTES);
        });
    }

    // Adds the products of the weights of a span's first tokens, 0 for those behind them, with their values. next: what is
    // read next.
    void add(const float (*weights)[SPAN], int64_t, const Span &span, const Span &next, int64_t length, Floats *sums) const {
        int64_t dimension = 0;
        for (; dimension + 64 <= step.head_dim; dimension += 64) add_vectors<4>(weights, span, next, length, dimension, sums);
        if (dimension < step.head_dim) add_vectors<2>(weights, span, next, length, dimension, sums);
    }

    template <int VECTORS>
    void add_vectors(const float (*weights)[SPAN], const Span &span, const Span &next, int64_t length, int64_t dimension,
                     Floats *sums) const {
        const int64_t stride = step.head_dim * 4;  // between queries, and between pairs of tokens
        char *const to = reinterpret_cast<char *>(sums) + dimension * 4;
        for_each<VECTORS>([&](auto v) { load_register<v>(to + v * 64, stride); });
        for (int64_t tile = 0; tile * TILE < length; tile++) {
            load_register<6>(bytes(weights) + tile * TILE * sizeof(bf16), SPAN_BYTES);
            const bf16 *values = span.tiles[tile].values + dimension * Items::SIDE;
            const bf16 *fetched = tile < next.num_tiles ? next.tiles[tile].keys + dimension * TILE : values;
            for_each<VECTORS>([&](auto v) {
                load_register<7>(bytes(values) + v * 64, stride);
                add_products<v, 6, 7>(bf16{});
                if (v % 2 == 0) fetch(fetched + v * TILE * TILE);
            });
        }
        for_each<VECTORS>([&](auto v) { store_register<v>(to + v * 64, stride); });
    }

    template <class T>
    static const char *bytes(const T *from) { return reinterpret_cast<const char *>(from); }

    // Prefetches what a register holds.
    static void fetch(const bf16 *from) {
        for (int64_t i = 0; i < REGISTER_BYTES; i += 64) __builtin_prefetch(bytes(from) + i);
    }
};
#endif

// The paged cache of keys and values: the layout of its blocks, and how tokens are stored in them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dots.hpp"
#include "vector.hpp"

constexpr int64_t TILE = 16;  // keys that are multiplied together: a block holds one or several tiles of tokens
constexpr int TILE_VECTORS = TILE / LANES;
constexpr int64_t SPAN = 128;  // tokens

// The tensors of one layer and step, in the order of the structure in Python.
struct AttentionStep {
    int64_t num_tokens, num_sequences, n_heads, n_kv_heads, head_dim, block_size;
    int64_t query_stride, key_stride, value_stride;  // between tokens, in floats
    const float *query;                              // [num_tokens, n_heads, head_dim]
    const float *key, *value;                        // [num_tokens, n_kv_heads, head_dim]
    float *context;                                  // [num_tokens, n_heads, head_dim]
    void *keys, *values;                             // the cache: [blocks, n_kv_heads, items of a block's head]
    const int64_t *query_starts;                     // [num_sequences + 1]: each sequence's first token of the step
    const int64_t *starts;                           // [num_sequences]: its tokens that were in the cache before
    const int64_t *block_tables;                     // [num_sequences, table_stride]
    int64_t table_stride;
    const float *slopes;  // [n_heads]
    float scale;
    int64_t window;  // how many tokens back a query sees besides its own
};

// Products of what is stored, widened to float32, with queries and weights in float32.
template <class Item>
struct WidenedItems {
    using Stored = Item;
    using Number = float;  // of queries and weights
    using Lanes = Floats;
    static constexpr int64_t SIDE = 1;  // how many numbers that are multiplied and added together lie side by side

    static Floats load_lanes(const Stored *from) { return load_floats(from); }
    static Floats add(Floats sum, Floats lanes, const float *number) { return multiply_add(splat(*number), lanes, sum); }
    static void store_numbers(float *to, Floats v) { store(to, v); }
    // Stores items SIDE items apart.
    static void store_apart(Stored *to, const Stored *items, int64_t count) { memcpy(to, items, count * sizeof(Stored)); }
};

#if defined(__AVX512BF16__)
// Products of pairs of bfloat16 with queries and weights that are rounded to it.
struct PairedItems {
    using Stored = bf16;
    using Number = bf16;
    using Lanes = Words;
    static constexpr int64_t SIDE = 2;

    static Words load_lanes(const bf16 *from) { return load<Words>(from); }
    static Floats add(Floats sum, Words lanes, const bf16 *pair) {
        int32_t both;
        memcpy(&both, pair, sizeof both);
        return add_dot(sum, lanes, (Words)_mm512_set1_epi32(both));
    }
    static void store_numbers(bf16 *to, Floats v) { store(to, _mm512_cvtneps_pbh((__m512)v)); }
    static void store_apart(bf16 *to, const bf16 *items, int64_t count) {
        int64_t i = 0;  // other threads write what lies between
        for (; i + LANES <= count; i += LANES)
            _mm512_mask_storeu_epi16(to + 2 * i, 0x55555555, (__m512i)__builtin_convertvector(load<Halves>(items + i), Words));
        for (; i < count; i++) to[2 * i] = items[i];
    }
};
#endif

// A block's keys of one head are stored as [head_dim, block_size], so that one vector holds the same dimension of many
// keys and no product needs to be summed across a vector; its values as [block_size, head_dim]. Of pairs, the numbers of
// two dimensions of a key, and of two tokens' values, lie side by side. Both are followed, if rounded to 8 bits, by the
// scales [block_size] of the tokens, in bfloat16.
template <class Items>
struct Cache {
    using Stored = typename Items::Stored;
    static constexpr int64_t SIDE = Items::SIDE;
    static constexpr bool IS_SCALED = std::is_same_v<Stored, int8_t>;
    static constexpr int64_t SCALE_ITEMS = IS_SCALED ? sizeof(bf16) : 0;
    static constexpr uint32_t EXPONENT = 0x7f800000;  // of float32, all ones where the number is not finite

    const AttentionStep &step;
    Stored *keys, *values;
    const int64_t head_items;  // of one head in a block

    explicit Cache(const AttentionStep &step)
        : step(step),
          keys(static_cast<Stored *>(step.keys)),
          values(static_cast<Stored *>(step.values)),
          head_items(step.block_size * (step.head_dim + SCALE_ITEMS)) {}

    // Where the keys, or values, of the block with a token of a sequence begin.
    int64_t place(int64_t sequence, int64_t position, int64_t kv_head) const {
        const int64_t block = step.block_tables[sequence * step.table_stride + position / step.block_size];
        return (block * step.n_kv_heads + kv_head) * head_items;
    }

    bf16 *scales(Stored *block) const {
        return reinterpret_cast<bf16 *>(block + step.block_size * step.head_dim);
    }

    // A tile, as scattered in memory as its block.
    struct Tile {
        Stored *keys, *values;
        const bf16 *key_scales, *value_scales;
    };

    // The tiles of a span, of which the last may be partly beyond its end.
    struct Span {
        int64_t begin = 0, num_tiles = 0;
        Tile tiles[SPAN / TILE];
    };

    Tile tile(int64_t sequence, int64_t position, int64_t kv_head) const {
        const int64_t block = place(sequence, position, kv_head), offset = position % step.block_size;
        return {keys + block + offset * SIDE, values + block + offset * step.head_dim, scales(keys + block) + offset,
                scales(values + block) + offset};
    }

    // Stores a token's keys and values; what is not finite as 0, so that a later owner of the block is not affected.
    // Returns whether all are finite.
    bool write(int64_t token, int64_t sequence, int64_t position) const {
        bool finite = true;
        const int64_t offset = position % step.block_size, side = offset % SIDE;
        for (int64_t head = 0; head < step.n_kv_heads; head++) {
            const int64_t to = place(sequence, position, head);
            const float *key = step.key + token * step.key_stride + head * step.head_dim;
            const float *value = step.value + token * step.value_stride + head * step.head_dim;
            finite &= store(key, scales(keys + to) + offset, [&](int64_t i, const Stored *items, int64_t count) {
                for (int64_t j = 0; j < count; j += SIDE)
                    memcpy(keys + to + offset * SIDE + (i + j) * step.block_size, items + j, SIDE * sizeof(Stored));
            });
            finite &= store(value, scales(values + to) + offset, [&](int64_t i, const Stored *items, int64_t count) {
                Items::store_apart(values + to + (offset - side) * step.head_dim + side + i * SIDE, items, count);
            });
        }
        return finite;
    }

    // Calls put(first, items, count) for parts of a key or value as they are stored. Returns whether all are finite.
    template <class Put>
    bool store(const float *from, [[maybe_unused]] bf16 *scale, const Put &put) const {
        bool finite = true;
        float inverse = 1;
        if constexpr (IS_SCALED) {
            float most = 0;
            for (int64_t i = 0; i < step.head_dim; i++)
                if (std::fabs(from[i]) < INFINITY) most = std::max(most, std::fabs(from[i]));
            // Rounded up, so that nothing exceeds 127; not so small that its inverse is infinite.
            store_rounded(scale, std::max(most * (1.01f / 127), 1e-30f));
            inverse = 1 / to_float(*scale);
        }
        constexpr int64_t PART = 64;
        for (int64_t i = 0; i < step.head_dim; i += PART) {
            const int64_t count = std::min(PART, step.head_dim - i);
            Stored items[PART];
            finite &= convert(from + i, count, inverse, items);
            put(i, items, count);
        }
        return finite;
    }

    // Without branches, so that the compiler makes vectors of it. Returns whether all are finite.
    static bool convert(const float *from, int64_t count, [[maybe_unused]] float inverse, Stored *items) {
        uint32_t wrong = 0;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            bool is_finite = (bits & EXPONENT) != EXPONENT;
            if constexpr (IS_SCALED) {
                items[i] = int8_t(rounded(is_finite ? from[i] * inverse : 0.f));
            } else if constexpr (std::is_same_v<Stored, bf16>) {
                const uint32_t half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // as store_rounded
                is_finite &= (half << 16 & EXPONENT) != EXPONENT;
                items[i].bits = is_finite ? uint16_t(half) : 0;
            } else {
                items[i] = is_finite ? from[i] : 0.f;
            }
            wrong |= !is_finite;
        }
        return wrong == 0;
    }
};

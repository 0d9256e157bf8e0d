// Causal attention with ALiBi and a sliding window, in place over the paged cache of keys and values.
//
// A query's keys are taken in spans of SPAN tokens, counted from the first token of its sequence, with the maximum and
// the sum of the softmax carried from span to span. So the bits of a context depend on the query's own sequence only.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

constexpr int64_t SPAN = 128;    // tokens
constexpr int64_t TILE = 16;     // keys that are multiplied together: a block holds one or several tiles of tokens
constexpr int QUERIES = LANES == 16 ? 8 : 4;  // at most, a power of 2: that share the reading of a key or value
constexpr int TILE_VECTORS = TILE / LANES;

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

// A block's keys of one head are stored as [head_dim, block_size], so that one vector holds the same dimension of many
// keys and no product needs to be summed across a vector; its values as [block_size, head_dim]. Both are followed, if
// rounded to 8 bits, by the scales [block_size] of the tokens, in bfloat16.
template <class Stored>
struct Attention {
    static constexpr bool IS_SCALED = std::is_same_v<Stored, int8_t>;
    static constexpr int64_t SCALE_ITEMS = IS_SCALED ? sizeof(bf16) : 0;
    static constexpr uint32_t EXPONENT = 0x7f800000;  // of float32, all ones where the number is not finite

    const AttentionStep &step;
    Stored *keys, *values;
    const int64_t head_items;      // of one head in a block of the cache
    std::vector<int64_t> owners;   // the sequence of each token
    std::vector<char> has_finite;  // whether a token's keys and values are finite

    explicit Attention(const AttentionStep &step)
        : step(step),
          keys(static_cast<Stored *>(step.keys)),
          values(static_cast<Stored *>(step.values)),
          head_items(step.block_size * (step.head_dim + SCALE_ITEMS)),
          owners(step.num_tokens),
          has_finite(step.num_tokens) {
        for (int64_t s = 0; s < step.num_sequences; s++)
            for (int64_t t = step.query_starts[s]; t < step.query_starts[s + 1]; t++) owners[t] = s;
    }

    int64_t position(int64_t token) const {
        return step.starts[owners[token]] + token - step.query_starts[owners[token]];
    }

    // Where the cache holds the keys, or values, of the block with a token of a sequence.
    int64_t place(int64_t sequence, int64_t position, int64_t kv_head) const {
        const int64_t block = step.block_tables[sequence * step.table_stride + position / step.block_size];
        return (block * step.n_kv_heads + kv_head) * head_items;
    }

    bf16 *scales(Stored *block) const {
        return reinterpret_cast<bf16 *>(block + step.block_size * step.head_dim);
    }

    // Stores a token's keys and values; what is not finite as 0, so that a later owner of the block is not affected.
    void write(int64_t token) {
        bool finite = true;
        const int64_t offset = position(token) % step.block_size;
        for (int64_t head = 0; head < step.n_kv_heads; head++) {
            const int64_t to = place(owners[token], position(token), head);
            const float *key = step.key + token * step.key_stride + head * step.head_dim;
            const float *value = step.value + token * step.value_stride + head * step.head_dim;
            finite &= copy(key, keys + to + offset, step.block_size, scales(keys + to) + offset);
            finite &= copy(value, values + to + offset * step.head_dim, 1, scales(values + to) + offset);
        }
        has_finite[token] = finite;
    }

    bool copy(const float *from, Stored *to, int64_t stride, [[maybe_unused]] bf16 *scale) const {
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
            for (int64_t j = 0; j < count; j++) to[(i + j) * stride] = items[j];
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

    // A tile of the cache, as scattered in memory as its block.
    struct Tile {
        Stored *keys, *values;
        const bf16 *key_scales, *value_scales;
    };

    Tile tile(int64_t sequence, int64_t position, int64_t kv_head) const {
        const int64_t block = place(sequence, position, kv_head), offset = position % step.block_size;
        return {keys + block + offset, values + block + offset * step.head_dim, scales(keys + block) + offset,
                scales(values + block) + offset};
    }

    const Stored *row(const Tile *tiles, int64_t token) const {
        return tiles[token / TILE].values + token % TILE * step.head_dim;
    }

    // The tiles of a span, of which the last may be partly beyond its end. Returns their number.
    int64_t find_tiles(int64_t sequence, int64_t kv_head, int64_t begin, int64_t end, Tile *tiles) const {
        int64_t count = 0;
        for (int64_t at = begin; at < std::min(begin + SPAN, end); at += TILE)
            tiles[count++] = tile(sequence, at, kv_head);
        return count;
    }

    // Prefetches a part of what is read next: blocks are scattered, so the hardware does not predict them.
    void prefetch(const Stored *from, int64_t items) const {
        const char *bytes = reinterpret_cast<const char *>(from);
        for (int64_t i = 0; i < items * int64_t(sizeof(Stored)); i += 64) __builtin_prefetch(bytes + i);
    }

    // Vectors of a head's dimensions, of which the last may be partly beyond them.
    template <class T>
    Floats dimensions(const T *from, int64_t at) const {
        if (at + LANES <= step.head_dim) return load_floats(from + at);
        Floats v{};
        for (int64_t i = at; i < step.head_dim; i++) v[i - at] = to_float(from[i]);
        return v;
    }

    int64_t kv_head_of(int64_t head) const { return head * step.n_kv_heads / step.n_heads; }

    // Attends from COUNT consecutive tokens of one sequence, for one head. next_head: the one that follows, or -1.
    template <int COUNT>
    void attend(int64_t token, int64_t head, int64_t next_head) const {
        const int64_t sequence = owners[token], kv_head = kv_head_of(head);
        const int64_t first = position(token), vectors = (step.head_dim + LANES - 1) / LANES;
        static thread_local std::vector<float> queries;  // [head_dim][COUNT]
        static thread_local std::vector<Floats> sums;    // [vectors][COUNT]
        queries.resize(step.head_dim * COUNT);
        sums.assign(vectors * COUNT, Floats{});
        for (int64_t q = 0; q < COUNT; q++)
            for (int64_t i = 0; i < step.head_dim; i++)
                queries[i * COUNT + q] = step.query[(token + q) * step.query_stride + head * step.head_dim + i];
        float highest_score[COUNT], total[COUNT] = {};
        std::fill(highest_score, highest_score + COUNT, -1e30f);  // finite: its difference from itself is 0
        const int64_t oldest = std::max<int64_t>(0, first - step.window) / SPAN * SPAN, end = first + COUNT;
        Tile tiles[SPAN / TILE], next_tiles[SPAN / TILE];
        int64_t num_tiles = find_tiles(sequence, kv_head, oldest, end, tiles), num_next = 0;
        for (int64_t begin = oldest; begin < end; begin += SPAN) {
            const int64_t length = std::min(SPAN, end - begin);
            num_next = 0;
            if (begin + SPAN < end)
                num_next = find_tiles(sequence, kv_head, begin + SPAN, end, next_tiles);
            else if (next_head >= 0)
                num_next = find_tiles(sequence, kv_head_of(next_head), oldest, end, next_tiles);
            alignas(64) float weights[COUNT][SPAN];
            // As many tiles together as there are registers for their sums.
            constexpr int TOGETHER = COUNT * TILE_VECTORS >= 8 ? 1 : 8 / (COUNT * TILE_VECTORS);
            score_all<COUNT, TOGETHER>(queries.data(), tiles, 0, num_tiles, weights);
            for (int q = 0; q < COUNT; q++) {
                const float factor =
                    softmax(weights[q], begin, begin + length, first + q, head, highest_score[q], total[q]);
                for (int64_t v = 0; v < vectors; v++) sums[v * COUNT + q] *= factor;
            }
            if constexpr (IS_SCALED) {
                for (int64_t t = 0; t < num_tiles * TILE; t += LANES) {
                    const Floats scale = load_floats(tiles[t / TILE].value_scales + t % TILE);
                    for (int q = 0; q < COUNT; q++) store(&weights[q][t], load_floats(&weights[q][t]) * scale);
                }
            }
            constexpr int CONTEXT_VECTORS = LANES == 16 ? std::min(4, 16 / COUNT) : 2;  // summed together
            int64_t v = 0;
            for (; v + CONTEXT_VECTORS <= vectors; v += CONTEXT_VECTORS)
                add_values<COUNT, CONTEXT_VECTORS>(v, tiles, next_tiles, length, num_next * TILE, weights, &sums[v * COUNT]);
            for (; v < vectors; v++) add_values<COUNT, 1>(v, tiles, next_tiles, length, num_next * TILE, weights, &sums[v * COUNT]);
            std::copy(next_tiles, next_tiles + num_next, tiles);
            num_tiles = num_next;
        }
        for (int64_t q = 0; q < COUNT; q++) {
            float *to = step.context + ((token + q) * step.n_heads + head) * step.head_dim;
            const float factor = has_finite[token + q] ? 1 / total[q] : NAN;
            for (int64_t i = 0; i < step.head_dim; i++)
                to[i] = sums[i / LANES * COUNT + q][i % LANES] * factor;
        }
    }

    // Scores the tiles [first, last), TILES together as long as there are as many.
    template <int COUNT, int TILES>
    void score_all(const float *queries, const Tile *tiles, int64_t first, int64_t last, float (*weights)[SPAN]) const {
        for (; first + TILES <= last; first += TILES)
            score<COUNT, TILES>(queries, tiles + first, weights, first * TILE);
        if constexpr (TILES > 1)
            if (first < last) score_all<COUNT, TILES / 2>(queries, tiles, first, last, weights);
    }

    // The products of the queries with the keys of some tiles, summed over the dimensions in their order, from
    // weights[query][at] on.
    template <int COUNT, int TILES>
    void score(const float *queries, const Tile *tiles, float (*weights)[SPAN], int64_t at) const {
        Floats sums[TILES * TILE_VECTORS][COUNT]{};
        const Stored *from[TILES];
        for (int t = 0; t < TILES; t++) from[t] = tiles[t].keys;
        for (int64_t i = 0; i < step.head_dim; i++) {
#pragma GCC unroll 8
            for (int t = 0; t < TILES; t++) {
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) {
                    const Floats key = load_floats(from[t] + v * LANES);
#pragma GCC unroll 8
                    for (int q = 0; q < COUNT; q++) {
                        Floats &sum = sums[t * TILE_VECTORS + v][q];
                        sum = multiply_add(splat(queries[i * COUNT + q]), key, sum);
                    }
                }
                from[t] += step.block_size;
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

    template <int COUNT, int N>
    void add_values(int64_t first, const Tile *tiles, const Tile *next, int64_t length, int64_t next_length, const float (*weights)[SPAN],
                    Floats *sums) const {
        Floats context[N][COUNT];
        memcpy(&context, sums, sizeof context);
        for (int64_t t = 0; t < length; t++) {
            if (first == 0 && t < next_length) prefetch(next[t / TILE].keys + t % TILE * step.head_dim, step.head_dim);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) {
                const Floats value = dimensions(row(tiles, t), (first + v) * LANES);
#pragma GCC unroll 8
                for (int q = 0; q < COUNT; q++)
                    context[v][q] = multiply_add(splat(weights[q][t]), value, context[v][q]);
            }
        }
        memcpy(sums, &context, sizeof context);
    }

    // Turns the scores of a span into weights and updates the softmax. Returns the factor by which earlier
    // sums must be multiplied.
    __attribute__((noinline)) float softmax(float *scores, int64_t begin, int64_t end, int64_t position, int64_t head,
                                            float &highest_score, float &total) const {
        const Floats slope = splat(step.slopes[head]);
        // Distances are whole numbers below 2^24, and compared as such: no context is that long.
        const Floats last = splat(float(std::min(end - 1, position) - position));
        const Floats oldest = splat(-float(std::min<int64_t>(step.window, 1 << 24)));
        Floats distance = splat(float(begin - position)) + lane_numbers(), most_of_lanes = splat(highest_score);
        for (int64_t t = 0; t < SPAN; t += LANES, distance += float(LANES)) {
            const Floats score = multiply_add(slope, distance, load<Floats>(scores + t) * step.scale);
            const Floats seen = distance > last || distance < oldest ? splat(-INFINITY) : score;
            store(scores + t, seen);
            most_of_lanes = max(most_of_lanes, seen);
        }
        const float most = highest(most_of_lanes);
        Floats added{};
        for (int64_t t = 0; t < SPAN; t += LANES) {
            const Floats weight = exp(load<Floats>(scores + t) - most);
            added += weight;
            store(scores + t, weight);
        }
        const float factor = exp(splat(highest_score - most))[0];
        total = total * factor + sum(added);
        highest_score = most;
        return factor;
    }
};

template <class Stored>
void attention(const AttentionStep &step, Pool &pool) {
    Attention<Stored> attention(step);
    // All keys are written before any is read.
    const int64_t tokens = std::clamp<int64_t>(step.num_tokens / (4 * pool.size()), 1, 16);  // in a piece
    pool.run((step.num_tokens + tokens - 1) / tokens, [&](int64_t piece) {
        for (int64_t t = piece * tokens; t < std::min(step.num_tokens, (piece + 1) * tokens); t++) attention.write(t);
    });
    std::vector<std::pair<int64_t, int64_t>> groups;  // of neighbouring tokens of a sequence: the first and how many
    for (int64_t s = 0; s < step.num_sequences; s++)
        for (int64_t t = step.query_starts[s], count = QUERIES; t < step.query_starts[s + 1]; t += count) {
            while (t + count > step.query_starts[s + 1]) count /= 2;
            groups.emplace_back(t, count);
        }
    // A piece is several heads of a group, if there are enough pieces: what the next one reads can be prefetched.
    int64_t heads = 1;
    while (heads < 8 && step.n_heads % (2 * heads) == 0 &&
           int64_t(groups.size()) * step.n_heads / (2 * heads) >= 8 * pool.size())
        heads *= 2;
    pool.run(int64_t(groups.size()) * step.n_heads / heads, [&](int64_t piece) {
        const auto [token, count] = groups[piece * heads / step.n_heads];
        const int64_t first = piece * heads % step.n_heads;
        for (int64_t head = first; head < first + heads; head++) {
            const int64_t next = head + 1 < first + heads ? head + 1 : -1;
            switch (count) {
                case 1: attention.template attend<1>(token, head, next); break;
                case 2: attention.template attend<2>(token, head, next); break;
                case 4: attention.template attend<4>(token, head, next); break;
                default: attention.template attend<QUERIES>(token, head, next);
            }
        }
    });
}

// Causal attention with ALiBi and a sliding window, in place over the paged cache of keys and values.
//
// A query's keys are taken in spans of SPAN tokens, counted from the first token of its sequence, with the maximum and
// the sum of the softmax carried from span to span. So the bits of a context depend on the query's own sequence only.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cache.hpp"
#include "pool.hpp"
#include "widened.hpp"

constexpr int64_t SPAN = 128;                 // tokens
constexpr int QUERIES = LANES == 16 ? 8 : 4;  // at most, a power of 2: that share the reading of a key or value
constexpr int64_t MAX_GROUPS = 8;             // of queries, which share a span in the processor's cache

template <class Items>
struct Attention {
    using Stored = typename Items::Stored;
    using Number = typename Items::Number;
    using Lanes = typename Items::Lanes;
    using Tile = typename Cache<Items>::Tile;
    static constexpr int64_t SIDE = Items::SIDE;
    static constexpr bool IS_SCALED = Cache<Items>::IS_SCALED;

    const AttentionStep &step;
    const Cache<Items> cache;
    const int64_t vectors;         // of a head's dimensions, of which the last may be partly beyond them
    std::vector<int64_t> owners;   // the sequence of each token
    std::vector<char> has_finite;  // whether a token's keys and values are finite

    explicit Attention(const AttentionStep &step)
        : step(step),
          cache(step),
          vectors((step.head_dim + LANES - 1) / LANES),
          owners(step.num_tokens),
          has_finite(step.num_tokens) {
        for (int64_t s = 0; s < step.num_sequences; s++)
            for (int64_t t = step.query_starts[s]; t < step.query_starts[s + 1]; t++) owners[t] = s;
    }

    int64_t position(int64_t token) const {
        return step.starts[owners[token]] + token - step.query_starts[owners[token]];
    }

    void write(int64_t token) { has_finite[token] = cache.write(token, owners[token], position(token)); }

    // The tiles of a span, of which the last may be partly beyond its end.
    struct Span {
        int64_t begin = 0, num_tiles = 0;
        Tile tiles[SPAN / TILE];
    };

    void find(int64_t sequence, int64_t head, int64_t begin, int64_t end, Span &span) const {
        span.begin = begin, span.num_tiles = 0;
        for (int64_t at = begin; at < std::min(begin + SPAN, end); at += TILE)
            span.tiles[span.num_tiles++] = cache.tile(sequence, at, head * step.n_kv_heads / step.n_heads);
    }

    // Consecutive queries of one sequence and head, and their softmax and context over the spans so far.
    struct Group {
        int64_t token, count;  // of the first, and a power of 2
        Number *queries;       // [head_dim / SIDE][count][SIDE]
        Floats *sums;          // [vectors][count]
        float highest_score[QUERIES], total[QUERIES];
    };

    // The first position of the spans that a query sees.
    int64_t oldest(int64_t position) const { return std::max<int64_t>(0, position - step.window) / SPAN * SPAN; }

    // Attends from consecutive tokens of one sequence, for one head. next_head: the one that follows, or -1.
    void attend(int64_t token, int64_t count, int64_t head, int64_t next_head) const {
        static thread_local std::vector<Number> queries;
        static thread_local std::vector<Floats> sums;
        static thread_local std::vector<Group> groups;
        queries.resize(count * step.head_dim);
        sums.assign(count * vectors, Floats{});
        groups.clear();
        for (int64_t done = 0, size = QUERIES; done < count; done += size) {
            while (done + size > count) size /= 2;
            groups.push_back({token + done, size, &queries[done * step.head_dim], &sums[done * vectors], {}, {}});
            begin(groups.back(), head);
        }
        const int64_t sequence = owners[token], first = oldest(position(token)), end = position(token) + count;
        Span span, next;
        find(sequence, head, first, end, span);
        for (int64_t at = first; at < end; at += SPAN, span = next) {
            next.num_tiles = 0;
            if (at + SPAN < end)
                find(sequence, head, at + SPAN, end, next);
            else if (next_head >= 0)
                find(sequence, next_head, first, end, next);
            for (Group &group : groups) {
                const int64_t from = position(group.token), to = from + group.count;
                if (at < oldest(from) || at >= to) continue;
                switch (group.count) {
                    case 1: add<1>(group, head, span, next, std::min(SPAN, to - at)); break;
                    case 2: add<2>(group, head, span, next, std::min(SPAN, to - at)); break;
                    case 4: add<4>(group, head, span, next, std::min(SPAN, to - at)); break;
                    default: add<QUERIES>(group, head, span, next, std::min(SPAN, to - at));
                }
            }
        }
        for (const Group &group : groups) finish(group, head);
    }

    void begin(Group &group, int64_t head) const {
        std::fill_n(group.highest_score, group.count, -1e30f);  // finite: its difference from itself is 0
        for (int64_t q = 0; q < group.count; q++) {
            const float *query = step.query + (group.token + q) * step.query_stride + head * step.head_dim;
            for (int64_t i = 0; i < step.head_dim; i += LANES) {
                const int64_t count = std::min<int64_t>(LANES, step.head_dim - i);
                Floats v{};
                if (count == LANES)
                    v = load<Floats>(query + i);
                else
                    memcpy(&v, query + i, 4 * count);
                Number items[LANES];
                Items::store_numbers(items, v);
                for (int64_t j = 0; j < count; j += SIDE)
                    memcpy(&group.queries[(i + j) * group.count + q * SIDE], items + j, SIDE * sizeof(Number));
            }
        }
    }

    void finish(const Group &group, int64_t head) const {
        for (int64_t q = 0; q < group.count; q++) {
            float *to = step.context + ((group.token + q) * step.n_heads + head) * step.head_dim;
            const float factor = has_finite[group.token + q] ? 1 / group.total[q] : NAN;
            for (int64_t v = 0; v < vectors; v++) {
                const Floats context = group.sums[v * group.count + q] * factor;
                if ((v + 1) * LANES <= step.head_dim)
                    store(to + v * LANES, context);
                else
                    memcpy(to + v * LANES, &context, 4 * (step.head_dim - v * LANES));
            }
        }
    }

    // Adds the first `length` tokens of a span.
    template <int COUNT>
    void add(Group &group, int64_t head, const Span &span, const Span &next, int64_t length) const {
        const int64_t num_tiles = (length + TILE - 1) / TILE;
        alignas(64) float weights[COUNT][SPAN];
        // As many tiles together as there are registers for their sums.
        constexpr int TOGETHER = std::max(1, int(8 * SIDE) / (COUNT * TILE_VECTORS));
        score_all<COUNT, TOGETHER>(group.queries, span.tiles, 0, num_tiles, weights);
        for (int q = 0; q < COUNT; q++) {
            const float factor = softmax(weights[q], span, length, position(group.token) + q, head, group.highest_score[q],
                                         group.total[q]);
            for (int64_t v = 0; v < vectors; v++) group.sums[v * COUNT + q] *= factor;
        }
        constexpr int CONTEXT_VECTORS = LANES == 16 ? std::min(4, 16 / COUNT) : 2;  // summed together
        int64_t v = 0;
        for (; (v + CONTEXT_VECTORS) * LANES <= step.head_dim; v += CONTEXT_VECTORS)
            add_values<COUNT, CONTEXT_VECTORS>(v, span, next, length, weights, &group.sums[v * COUNT]);
        for (; v < vectors; v++) add_values<COUNT, 1>(v, span, next, length, weights, &group.sums[v * COUNT]);
    }

    static Number *numbers(float *weights) { return reinterpret_cast<Number *>(weights); }
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

    // Turns the scores of the first `length` tokens of a span into the numbers that values are multiplied with, in place, and
    // updates the softmax. Returns the factor by which earlier sums must be multiplied.
    __attribute__((noinline)) float softmax(float *scores, const Span &span, int64_t length, int64_t position, int64_t head,
                                            float &highest_score, float &total) const {
        const Floats slope = splat(step.slopes[head]);
        // Distances are whole numbers below 2^24, and compared as such: no context is that long.
        const Floats last = splat(float(std::min(span.begin + length - 1, position) - position));
        const Floats oldest = splat(-float(std::min<int64_t>(step.window, 1 << 24)));
        Floats distance = splat(float(span.begin - position)) + lane_numbers(), most_of_lanes = splat(highest_score);
        for (int64_t t = 0; t < length; t += LANES, distance += float(LANES)) {
            const Floats score = multiply_add(slope, distance, load<Floats>(scores + t) * step.scale);
            const Floats seen = distance > last || distance < oldest ? splat(-INFINITY) : score;
            store(scores + t, seen);
            most_of_lanes = max(most_of_lanes, seen);
        }
        const float most = highest(most_of_lanes);
        Floats added{};
        for (int64_t t = 0; t < length; t += LANES) {
            Floats weight = exp(load<Floats>(scores + t) - most);
            added += weight;
            if constexpr (IS_SCALED) weight *= load_floats(span.tiles[t / TILE].value_scales + t % TILE);
            Items::store_numbers(numbers(scores) + t, weight);
        }
        const float factor = exp(splat(highest_score - most))[0];
        total = total * factor + sum(added);
        highest_score = most;
        return factor;
    }
};

template <class Items>
void attention(const AttentionStep &step, Pool &pool) {
    Attention<Items> attention(step);
    // All keys are written before any is read.
    const int64_t tokens = std::clamp<int64_t>(step.num_tokens / (4 * pool.size()), 1, 16);  // in a piece
    pool.run((step.num_tokens + tokens - 1) / tokens, [&](int64_t piece) {
        for (int64_t t = piece * tokens; t < std::min(step.num_tokens, (piece + 1) * tokens); t++) attention.write(t);
    });
    // As many queries together as leave enough pieces.
    int64_t most = MAX_GROUPS * QUERIES;
    while (most > QUERIES && step.num_tokens * step.n_heads / most < 8 * pool.size()) most /= 2;
    std::vector<std::pair<int64_t, int64_t>> parts;  // of sequences: the first token and how many
    for (int64_t s = 0; s < step.num_sequences; s++)
        for (int64_t t = step.query_starts[s], end = step.query_starts[s + 1]; t < end; t += most)
            parts.emplace_back(t, std::min(most, end - t));
    // A piece is several heads of a part, if there are enough pieces: what the next one reads can be prefetched.
    int64_t heads = 1;
    while (heads < 8 && step.n_heads % (2 * heads) == 0 &&
           int64_t(parts.size()) * step.n_heads / (2 * heads) >= 8 * pool.size())
        heads *= 2;
    pool.run(int64_t(parts.size()) * step.n_heads / heads, [&](int64_t piece) {
        const auto [token, count] = parts[piece * heads / step.n_heads];
        const int64_t first = piece * heads % step.n_heads;
        for (int64_t head = first; head < first + heads; head++)
            attention.attend(token, count, head, head + 1 < first + heads ? head + 1 : -1);
    });
}

// Causal attention with ALiBi and a sliding window, in place over the paged cache of keys and values.
//
// A query's keys are taken in spans of SPAN tokens, counted from the first token of its sequence, with the maximum and
// the sum of the softmax carried from span to span. So the bits of a context depend on the query's own sequence only.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "pool.hpp"
#include "tile_attention.hpp"
#include "vector_attention.hpp"

constexpr int64_t MAX_QUERIES = 64;  // which share a span in the processor's cache

// Products: those of a group of queries with keys, and of their weights with values.
template <class Products>
struct Attention {
    using Items = typename Products::Items;
    using Number = typename Items::Number;
    using Span = typename Cache<Items>::Span;
    static constexpr int QUERIES = Products::QUERIES;

    const AttentionStep &step;
    const Cache<Items> cache;
    const Products products;
    const int64_t vectors;         // of a head's dimensions, of which the last may be partly beyond them
    std::vector<int64_t> owners;   // the sequence of each token
    std::vector<char> has_finite;  // whether a token's keys and values are finite

    explicit Attention(const AttentionStep &step)
        : step(step),
          cache(step),
          products{step},
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

    void find(int64_t sequence, int64_t head, int64_t begin, int64_t end, Span &span) const {
        span.begin = begin, span.num_tiles = 0;
        for (int64_t at = begin; at < std::min(begin + SPAN, end); at += TILE)
            span.tiles[span.num_tiles++] = cache.tile(sequence, at, head * step.n_kv_heads / step.n_heads);
    }

    // Consecutive queries of one sequence and head, and their softmax and context over the spans so far.
    struct Group {
        int64_t token, count;  // of the first
        Number *queries;
        Floats *sums;
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
        for (int64_t done = 0; done < count; done += groups.back().count) {
            const int64_t size = Products::group_size(count - done);
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
                add(group, head, span, next, std::min(SPAN, to - at));
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
                for (int64_t j = 0; j < count; j += Items::SIDE)
                    memcpy(&group.queries[Products::query_place(i + j, q, group.count)], items + j, Items::SIDE * sizeof(Number));
            }
        }
    }

    void finish(const Group &group, int64_t head) const {
        for (int64_t q = 0; q < group.count; q++) {
            float *to = step.context + ((group.token + q) * step.n_heads + head) * step.head_dim;
            const float factor = has_finite[group.token + q] ? 1 / group.total[q] : NAN;
            for (int64_t v = 0; v < vectors; v++) {
                const Floats context = sum_of(group, v, q) * factor;
                if ((v + 1) * LANES <= step.head_dim)
                    store(to + v * LANES, context);
                else
                    memcpy(to + v * LANES, &context, 4 * (step.head_dim - v * LANES));
            }
        }
    }

    Floats &sum_of(const Group &group, int64_t vector, int64_t query) const {
        return group.sums[Products::sum_place(vector, query, group.count, vectors)];
    }

    // Adds the first `length` tokens of a span.
    void add(Group &group, int64_t head, const Span &span, const Span &next, int64_t length) const {
        alignas(64) float weights[QUERIES][SPAN];
        products.score(group.queries, group.count, span, (length + TILE - 1) / TILE, weights);
        for (int64_t q = 0; q < group.count; q++) {
            const float factor = softmax(weights[q], span, length, position(group.token) + q, head, group.highest_score[q],
                                         group.total[q]);
            for (int64_t v = 0; v < vectors; v++) sum_of(group, v, q) *= factor;
        }
        products.add(weights, group.count, span, next, length, group.sums);
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
            if constexpr (Cache<Items>::IS_SCALED) weight *= load_floats(span.tiles[t / TILE].value_scales + t % TILE);
            Items::store_numbers(reinterpret_cast<Number *>(scores) + t, weight);
        }
        const float factor = exp(splat(highest_score - most))[0];
        total = total * factor + sum(added);
        highest_score = most;
        return factor;
    }
};

template <class Products>
void attention(const AttentionStep &step, Pool &pool) {
    Attention<Products> attention(step);
    // All keys are written before any is read.
    const int64_t tokens = std::clamp<int64_t>(step.num_tokens / (4 * pool.size()), 1, 16);  // in a piece
    pool.run((step.num_tokens + tokens - 1) / tokens, [&](int64_t piece) {
        for (int64_t t = piece * tokens; t < std::min(step.num_tokens, (piece + 1) * tokens); t++) attention.write(t);
    });
    // As many queries together as leave enough pieces.
    int64_t most = MAX_QUERIES;
    while (most > Products::QUERIES && step.num_tokens * step.n_heads / most < 8 * pool.size()) most /= 2;
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
        [[maybe_unused]] const typename Products::Context context{};
        const auto [token, count] = parts[piece * heads / step.n_heads];
        const int64_t first = piece * heads % step.n_heads;
        for (int64_t head = first; head < first + heads; head++)
            attention.attend(token, count, head, head + 1 < first + heads ? head + 1 : -1);
    });
}

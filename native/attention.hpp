// Causal attention with ALiBi and a sliding window, in place over the paged cache of keys and values.
//
// A query's keys are taken in spans of SPAN tokens, counted from the first token of its sequence, with the maximum and
// the sum of the softmax carried from span to span. So the bits of a context depend on the query's own sequence only.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

constexpr int64_t SPAN = 128;     // tokens
constexpr int64_t AHEAD = 24;    // how many tokens ahead keys and values are prefetched
constexpr int QUERIES = 4;        // that share the reading of a key or value
constexpr int CONTEXT_VECTORS = LANES == 16 ? 4 : 2;  // of a context, summed together

// The tensors of one layer and step, in the order of the structure in Python.
struct AttentionStep {
    int64_t num_tokens, num_sequences, n_heads, n_kv_heads, head_dim, block_size;
    int64_t query_stride, key_stride, value_stride;  // between tokens, in floats
    const float *query;                              // [num_tokens, n_heads, head_dim]
    const float *key, *value;                        // [num_tokens, n_kv_heads, head_dim]
    float *context;                                  // [num_tokens, n_heads, head_dim]
    void *keys, *values;                             // [blocks, n_kv_heads, block_size, head_dim]
    const int64_t *query_starts;                     // [num_sequences + 1]: each sequence's first token of the step
    const int64_t *starts;                           // [num_sequences]: its tokens that were in the cache before
    const int64_t *block_tables;                     // [num_sequences, table_stride]
    int64_t table_stride;
    const float *slopes;  // [n_heads]
    float scale;
    int64_t window;  // how many tokens back a query sees besides its own
};

template <class Stored>
struct Attention {
    const AttentionStep &step;
    Stored *keys, *values;
    std::vector<int64_t> owners;   // the sequence of each token
    std::vector<char> has_finite;  // whether a token's keys and values are finite

    explicit Attention(const AttentionStep &step)
        : step(step),
          keys(static_cast<Stored *>(step.keys)),
          values(static_cast<Stored *>(step.values)),
          owners(step.num_tokens),
          has_finite(step.num_tokens) {
        for (int64_t s = 0; s < step.num_sequences; s++)
            for (int64_t t = step.query_starts[s]; t < step.query_starts[s + 1]; t++) owners[t] = s;
    }

    int64_t position(int64_t token) const {
        return step.starts[owners[token]] + token - step.query_starts[owners[token]];
    }

    // Where the cache holds a token's key or value.
    int64_t place(int64_t sequence, int64_t position, int64_t kv_head) const {
        const int64_t block = step.block_tables[sequence * step.table_stride + position / step.block_size];
        return ((block * step.n_kv_heads + kv_head) * step.block_size + position % step.block_size) * step.head_dim;
    }

    // Stores a token's keys and values; what is not finite as 0, so that a later owner of the block is not affected.
    void write(int64_t token) {
        bool finite = true;
        for (int64_t head = 0; head < step.n_kv_heads; head++) {
            const int64_t to = place(owners[token], position(token), head);
            finite &= copy(step.key + token * step.key_stride + head * step.head_dim, keys + to);
            finite &= copy(step.value + token * step.value_stride + head * step.head_dim, values + to);
        }
        has_finite[token] = finite;
    }

    bool copy(const float *from, Stored *to) const {
        bool finite = true;
        for (int64_t i = 0; i < step.head_dim; i++) {
            store_rounded(to + i, from[i]);
            if (!(std::fabs(to_float(to[i])) < INFINITY)) {
                store_rounded(to + i, 0.f);
                finite = false;
            }
        }
        return finite;
    }

    // Prefetches a later token's key or value: blocks are scattered, so the hardware does not predict them.
    void prefetch(const Stored *rows, const int64_t *places, int64_t token, int64_t length) const {
        const char *row = reinterpret_cast<const char *>(rows + places[std::min(token + AHEAD, length - 1)]);
        for (int64_t i = 0; i < step.head_dim * int64_t(sizeof(Stored)); i += 64) __builtin_prefetch(row + i);
    }

    // Vectors of a head's dimensions, of which the last may be partly beyond them.
    template <class T>
    Floats dimensions(const T *from, int64_t at) const {
        if (at + LANES <= step.head_dim) return load_floats(from + at);
        Floats v{};
        for (int64_t i = at; i < step.head_dim; i++) v[i - at] = to_float(from[i]);
        return v;
    }

    // Attends from COUNT consecutive tokens of one sequence, for one head.
    template <int COUNT>
    void attend(int64_t token, int64_t head) const {
        const int64_t sequence = owners[token], kv_head = head * step.n_kv_heads / step.n_heads;
        const int64_t first = position(token), vectors = (step.head_dim + LANES - 1) / LANES;
        static thread_local std::vector<Floats> buffer;
        buffer.assign(2 * COUNT * vectors, Floats{});
        Floats *const queries = &buffer[0], *const sums = &buffer[COUNT * vectors];  // [vectors][COUNT]
        for (int64_t q = 0; q < COUNT; q++)
            for (int64_t v = 0; v < vectors; v++)
                queries[v * COUNT + q] =
                    dimensions(step.query + (token + q) * step.query_stride + head * step.head_dim, v * LANES);
        float highest_score[COUNT], total[COUNT] = {};
        std::fill(highest_score, highest_score + COUNT, -1e30f);  // finite: its difference from itself is 0
        const int64_t oldest = std::max<int64_t>(0, first - step.window) / SPAN * SPAN;
        for (int64_t begin = oldest; begin < first + COUNT; begin += SPAN) {
            const int64_t length = std::min(SPAN, first + COUNT - begin);
            int64_t places[SPAN];
            for (int64_t t = 0; t < length; t++) places[t] = place(sequence, begin + t, kv_head);
            alignas(64) float weights[COUNT][SPAN];
            for (int64_t t = 0; t < length; t++) {
                prefetch(keys, places, t, length);
                Floats products[COUNT]{};
                for (int64_t v = 0; v < vectors; v++) {
                    const Floats key = dimensions(keys + places[t], v * LANES);
#pragma GCC unroll 4
                    for (int q = 0; q < COUNT; q++) 
                        products[q] = multiply_add(queries[v * COUNT + q], key, products[q]);
                }
                for (int q = 0; q < COUNT; q++) weights[q][t] = sum(products[q]);
            }
            for (int q = 0; q < COUNT; q++) {
                const float factor =
                    softmax(weights[q], begin, begin + length, first + q, head, highest_score[q], total[q]);
                for (int64_t v = 0; v < vectors; v++) sums[v * COUNT + q] *= factor;
            }
            int64_t v = 0;
            for (; v + CONTEXT_VECTORS <= vectors; v += CONTEXT_VECTORS)
                add_values<COUNT, CONTEXT_VECTORS>(v, places, length, weights, sums + v * COUNT);
            for (; v < vectors; v++) add_values<COUNT, 1>(v, places, length, weights, sums + v * COUNT);
        }
        for (int64_t q = 0; q < COUNT; q++) {
            float *to = step.context + ((token + q) * step.n_heads + head) * step.head_dim;
            const float factor = has_finite[token + q] ? 1 / total[q] : NAN;
            for (int64_t i = 0; i < step.head_dim; i++)
                to[i] = sums[i / LANES * COUNT + q][i % LANES] * factor;
        }
    }

    template <int COUNT, int N>
    void add_values(int64_t first, const int64_t *places, int64_t length, const float (*weights)[SPAN],
                    Floats *sums) const {
        Floats context[N][COUNT];
        memcpy(&context, sums, sizeof context);
        for (int64_t t = 0; t < length; t++) {
            if (first == 0) prefetch(values, places, t, length);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) {
                const Floats value = dimensions(values + places[t], (first + v) * LANES);
#pragma GCC unroll 4
                for (int q = 0; q < COUNT; q++) 
                    context[v][q] = multiply_add(splat(weights[q][t]), value, context[v][q]);
            }
        }
        memcpy(sums, &context, sizeof context);
    }

    // Turns the scores of a span into weights and updates the softmax. Returns the factor by which earlier
    // sums must be multiplied.
    __attribute__((noinline)) float softmax(float *scores, int64_t begin, int64_t end, int64_t position, int64_t head, float &highest_score,
                  float &total) const {
        const float slope = step.slopes[head];
        float most = highest_score;
        for (int64_t t = begin; t < begin + SPAN; t++) {
            float &score = scores[t - begin];
            const int64_t distance = t - position;
            if (t >= end || distance > 0 || distance < -step.window)
                score = -INFINITY;
            else
                score = score * step.scale + slope * float(distance);
            most = std::max(most, score);
        }
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
    const int64_t TOKENS = 16;
    pool.run((step.num_tokens + TOKENS - 1) / TOKENS, [&](int64_t piece) {
        for (int64_t t = piece * TOKENS; t < std::min(step.num_tokens, (piece + 1) * TOKENS); t++) attention.write(t);
    });
    std::vector<std::pair<int64_t, int64_t>> groups;  // of neighbouring tokens of a sequence: the first and how many
    for (int64_t s = 0; s < step.num_sequences; s++)
        for (int64_t t = step.query_starts[s]; t < step.query_starts[s + 1]; t += QUERIES)
            groups.emplace_back(t, std::min<int64_t>(QUERIES, step.query_starts[s + 1] - t));
    pool.run(int64_t(groups.size()) * step.n_heads, [&](int64_t piece) {
        const auto [token, count] = groups[piece / step.n_heads];
        const int64_t head = piece % step.n_heads;
        switch (count) {
            case 1: return attention.template attend<1>(token, head);
            case 2: return attention.template attend<2>(token, head);
            case 3: return attention.template attend<3>(token, head);
            default: return attention.template attend<QUERIES>(token, head);
        }
    });
}

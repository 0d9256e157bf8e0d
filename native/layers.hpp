// The layers of the model, one after the other.
#pragma once

#include <memory>
#include <utility>

#include "attention.hpp"
#include "matrix.hpp"
#include "pointwise.hpp"

// As the block of model/mpt.py. Missing parts have a null matrix or weight.
struct Layer {
    Norm norm_1;
    Linear qkv;             // all queries, then the keys, then the values
    Norm q_norm, k_norm;    // may be missing
    Linear out;
    Norm norm_2;
    Linear up, gate, down;  // the gate may be missing
};

inline void attention(const AttentionStep &step, Type cache, Pool &pool) {
    switch (cache) {
        case Type::float32: return attention<VectorAttention<WidenedItems<float>>>(step, pool);
        case Type::bfloat16:
#if defined(__AMX_TILE__)
            if (TileAttention::can_compute(step)) return attention<TileAttention>(step, pool);
#endif
#if defined(__AVX512BF16__)
            if (step.head_dim % 2 == 0) return attention<VectorAttention<PairedItems>>(step, pool);
#endif
            return attention<VectorAttention<WidenedItems<bf16>>>(step, pool);
        case Type::int8: return attention<VectorAttention<WidenedItems<int8_t>>>(step, pool);
    }
}

// Arrays for the results within a layer. The memory stays with the thread: fresh pages for each step would take a part of
// its time.
class Scratch {
   public:
    explicit Scratch(int64_t lines) {
        if (lines > capacity) capacity = 0, memory.reset(), memory.reset(new Line[lines]), capacity = lines;
    }
    float *take(int64_t floats) {
        return reinterpret_cast<float *>(memory.get() + std::exchange(taken, taken + num_lines(4 * floats)));
    }

   private:
    static inline thread_local std::unique_ptr<Line[]> memory;
    static inline thread_local int64_t capacity = 0;
    int64_t taken = 0;
};

// Computes the layers for x [tokens of the step, d_model], in place. layer_bytes: of a layer in the cache of keys.
inline void run_layers(const Layer *layers, int64_t count, float *x, AttentionStep step, Type cache,
                       int64_t layer_bytes, Pool &pool) {
    const int64_t rows = step.num_tokens, size = layers->qkv.matrix->inputs, width = layers->qkv.matrix->outputs;
    const int64_t kv_size = step.n_kv_heads * step.head_dim, hidden_size = layers->up.matrix->outputs;
    const int64_t gate_size = layers->gate.matrix == nullptr ? 0 : hidden_size;
    const int64_t floats = rows * (3 * size + width + hidden_size + gate_size);
    Scratch scratch(num_lines(4 * floats) + 6);  // each of the six arrays begins with a line
    float *const normed = scratch.take(rows * size), *const qkv = scratch.take(rows * width);
    float *const context = scratch.take(rows * size), *const attended = scratch.take(rows * size);
    float *const hidden = scratch.take(rows * hidden_size), *const gate = scratch.take(rows * gate_size);
    step.query = qkv, step.key = qkv + size, step.value = qkv + size + kv_size;
    step.query_stride = step.key_stride = step.value_stride = width;
    step.context = context;
    for (const Layer *layer = layers; layer < layers + count; layer++) {
        normalize(x, size, rows, size, layer->norm_1, normed, size, pool);
        multiply(layer->qkv, normed, rows, qkv, nullptr, pool);
        if (layer->q_norm.weight != nullptr) {
            normalize(step.query, width, rows, size, layer->q_norm, qkv, width, pool);
            normalize(step.key, width, rows, kv_size, layer->k_norm, qkv + size, width, pool);
        }
        attention(step, cache, pool);
        step.keys = static_cast<char *>(step.keys) + layer_bytes;
        step.values = static_cast<char *>(step.values) + layer_bytes;
        multiply(layer->out, context, rows, attended, x, pool);
        normalize(attended, size, rows, size, layer->norm_2, normed, size, pool);
        multiply(layer->up, normed, rows, hidden, nullptr, pool);
        if (layer->gate.matrix != nullptr) {
            multiply(layer->gate, normed, rows, gate, nullptr, pool);
            for (int64_t i = 0; i < rows * hidden_size; i++) hidden[i] *= gate[i];
        }
        multiply(layer->down, hidden, rows, x, attended, pool);
    }
}

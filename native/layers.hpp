// The layers of the model, one after the other.
#pragma once

#include <memory>

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
        case Type::float32: return attention<float>(step, pool);
        case Type::bfloat16: return attention<bf16>(step, pool);
        case Type::int8: return attention<int8_t>(step, pool);
    }
}

// Computes the layers for x [tokens of the step, d_model], in place. layer_bytes: of a layer in the cache of keys.
inline void run_layers(const Layer *layers, int64_t count, float *x, AttentionStep step, Type cache,
                       int64_t layer_bytes, Pool &pool) {
    const int64_t rows = step.num_tokens, size = layers->qkv.matrix->inputs, width = layers->qkv.matrix->outputs;
    const int64_t kv_size = step.n_kv_heads * step.head_dim, hidden_size = layers->up.matrix->outputs;
    const auto floats = [&](int64_t columns) { return std::unique_ptr<float[]>(new float[rows * columns]); };
    const auto normed = floats(size), qkv = floats(width), context = floats(size), attended = floats(size);
    const auto hidden = floats(hidden_size), gate = floats(layers->gate.matrix == nullptr ? 0 : hidden_size);
    step.query = qkv.get(), step.key = qkv.get() + size, step.value = qkv.get() + size + kv_size;
    step.query_stride = step.key_stride = step.value_stride = width;
    step.context = context.get();
    for (const Layer *layer = layers; layer < layers + count; layer++) {
        normalize(x, size, rows, size, layer->norm_1, normed.get(), size, pool);
        multiply(layer->qkv, normed.get(), rows, qkv.get(), nullptr, pool);
        if (layer->q_norm.weight != nullptr) {
            normalize(step.query, width, rows, size, layer->q_norm, qkv.get(), width, pool);
            normalize(step.key, width, rows, kv_size, layer->k_norm, qkv.get() + size, width, pool);
        }
        attention(step, cache, pool);
        step.keys = static_cast<char *>(step.keys) + layer_bytes;
        step.values = static_cast<char *>(step.values) + layer_bytes;
        multiply(layer->out, context.get(), rows, attended.get(), x, pool);
        normalize(attended.get(), size, rows, size, layer->norm_2, normed.get(), size, pool);
        multiply(layer->up, normed.get(), rows, hidden.get(), nullptr, pool);
        if (layer->gate.matrix != nullptr) {
            multiply(layer->gate, normed.get(), rows, gate.get(), nullptr, pool);
            for (int64_t i = 0; i < rows * hidden_size; i++) hidden[i] *= gate[i];
        }
        multiply(layer->down, hidden.get(), rows, x, attended.get(), pool);
    }
}

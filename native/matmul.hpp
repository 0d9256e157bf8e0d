// y = activation(x Wᵀ + bias) + residual, for packed weights W.
//
// Weights are packed in panels of 16 outputs, so that a vector holds the weights of several outputs for the same
// inputs. Each output is one chain of additions over the inputs in their order: its bits depend on its own row of x and
// on the instruction set, not on the other rows or the number of threads.
#pragma once

#include <algorithm>
#include <memory>

#include "activation.hpp"
#include "pool.hpp"
#include "vector.hpp"

constexpr int PANEL = 16;                  // outputs
constexpr int VECTORS = PANEL / LANES;     // in a panel
constexpr int64_t INPUT_BLOCK = 1024;      // inputs whose weights stay in the cache for several tiles of rows
constexpr int64_t ROW_BLOCK = 96;          // rows of x that stay in the cache for several panels
constexpr int64_t PIECE_BYTES = 64 << 10;  // of weights in one piece of work, at least
constexpr int64_t GROUP = 128;             // inputs that share a scale where x is rounded to 8 bits

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;
#elif defined(__AVX__)
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 3;
#endif
// Panels that are computed together: as many as there are registers for their sums.
constexpr int MAX_PANELS = 4, PANELS_OF_MANY_ROWS = LANES == 16 ? 2 : 1;
constexpr int FEW_ROWS = MAX_ROWS / 3;

// An 8-bit weight plus 128, in units of its output's scale.
struct Int8 {
    uint8_t biased;
};

inline float to_float(Int8 x) { return float(x.biased) - 128.f; }

// How many inputs lie side by side in a panel, so that a 32-bit lane holds the weights of one output for all of them.
template <class Weight>
constexpr int64_t SIDE = 4 / sizeof(Weight);

template <class Weight>
inline int64_t packed_index(int64_t n, int64_t k) {
    return (k / SIDE<Weight> * PANEL + n) * SIDE<Weight> + k % SIDE<Weight>;
}

inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// Rows of x in tiles of up to MAX_ROWS rows of about equal height.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows) : rows(rows), count((rows + MAX_ROWS - 1) / MAX_ROWS) {}
    int64_t start(int64_t tile) const { return tile * rows / count; }
    int height(int64_t tile) const { return int(start(tile + 1) - start(tile)); }
};

// The weights of one lane's output for input I of those that lie side by side.
template <int I>
inline Floats widened(Words lanes, const float *) {
    return as_floats(lanes);
}
template <int I>
inline Floats widened(Words lanes, const bf16 *) {
    return as_floats(I == 0 ? lanes << 16 : lanes & 0xffff0000u);
}
template <int I>
inline Floats widened(Words lanes, const Int8 *) {
    return __builtin_convertvector((Ints)((lanes ^ 0x80808080u) << (24 - 8 * I)) >> 24, Floats);
}

// A copy of sums that is only used with constant indices, so that the compiler can keep it in registers.
template <int ROWS, int COLUMNS>
struct InRegisters {
    Floats sums[ROWS][COLUMNS];

    explicit InRegisters(const Floats (&from)[ROWS][COLUMNS]) { copy(from, sums); }
    void copy_to(Floats (&to)[ROWS][COLUMNS]) const { copy(sums, to); }

    static void copy(const Floats (&from)[ROWS][COLUMNS], Floats (&to)[ROWS][COLUMNS]) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) to[i][j] = from[i][j];
    }
};

// Products with float32 x: weights are widened in registers. x is packed as [tile][input][row of the tile].
template <class Weight>
struct Widened {
    using Packed = float;

    const float *x;
    const Weight *weights;
    int64_t inputs;

    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * inputs; }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, float *packed) {
        float *to = packed + start * inputs;
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t i = 0; i < height; i++) to[k * height + i] = x[(start + i) * inputs + k];
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, Floats (&sums)[ROWS][PANELS * VECTORS]) const {
        constexpr int64_t AHEAD = 4096 / sizeof(Weight) / (PANELS > 1 ? 2 : 1);
        const float *at = x + row * inputs + begin * ROWS;
        const Weight *w = weights + panel * PANEL * inputs + begin * PANEL;
        InRegisters<ROWS, PANELS * VECTORS> local(sums);
        for (int64_t k = begin; k < end; k += SIDE<Weight>, at += SIDE<Weight> * ROWS, w += SIDE<Weight> * PANEL) {
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) __builtin_prefetch(w + p * PANEL * inputs + AHEAD);
            side<0>(at, w, local.sums);
            if constexpr (SIDE<Weight> > 1) side<1>(at, w, local.sums);
            if constexpr (SIDE<Weight> > 2) side<2>(at, w, local.sums), side<3>(at, w, local.sums);
        }
        local.copy_to(sums);
    }

    template <int I, int ROWS, int COLUMNS>
    void side(const float *at, const Weight *w, Floats (&sums)[ROWS][COLUMNS]) const {
        Floats wide[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++)
            wide[j] = widened<I>(load<Words>(w + j / VECTORS * PANEL * inputs + j % VECTORS * LANES * SIDE<Weight>), w);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Floats value = splat(at[I * ROWS + i]);
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) add_product(sums[i][j], value, wide[j]);
        }
    }
};

#if defined(__AVX512VNNI__) || defined(__AVX2__)
// Products of 8-bit weights with x rounded to integers, with one scale for each GROUP inputs of a row: the integer sums
// of a group are exact. x is packed as [tile][group][scales, sums x -128, inputs / 4][row of the tile].
struct IntegerProducts {
    using Packed = int32_t;
#if defined(__AVX512VNNI__)
    using Value = int8_t;
    using Values = Bytes;
    static constexpr int LARGEST = 127;
#else
    using Value = int16_t;  // the instructions take 16 bits, so that rounding x hardly costs accuracy
    using Values = Shorts;
    static constexpr int LARGEST = 32767;
#endif

    const int32_t *x;
    const Int8 *weights;
    int64_t inputs;

    static constexpr int64_t SIDE_WORDS = sizeof(Value);         // of four inputs of a row, in 32 bits
    static constexpr int64_t WORDS = 2 + GROUP / 4 * SIDE_WORDS;  // of a full group and one row

    static int64_t row_words(int64_t inputs) { return inputs / 4 * SIDE_WORDS + 2 * ((inputs + GROUP - 1) / GROUP); }
    static int64_t packed_size(int64_t rows, int64_t inputs) { return rows * row_words(inputs); }

    static void pack(const float *x, int64_t inputs, int64_t start, int64_t height, int32_t *packed) {
        int32_t *to = packed + start * row_words(inputs);
        for (int64_t begin = 0; begin < inputs; begin += GROUP, to += WORDS * height)
            for (int64_t i = 0; i < height; i++)
                pack_group(x + (start + i) * inputs + begin, std::min(GROUP, inputs - begin), to, i, height);
    }

    static void pack_group(const float *x, int64_t count, int32_t *to, int64_t row, int64_t height) {
        float padded[GROUP] = {};
        memcpy(padded, x, 4 * count);
        Floats largest{}, differences{};
        for (int64_t k = 0; k < GROUP; k += LANES) {
            const Floats v = load<Floats>(padded + k);
            largest = max(largest, max(v, -v));
            differences += v - v;  // NaN if a value is not finite
        }
        const float most = highest(largest), scale = most / LARGEST + sum(differences);
        const float inverse = most > 1e-30f && std::isfinite(scale) ? LARGEST / most : 0;
        Value integers[GROUP];
        Ints total{};
        for (int64_t k = 0; k < GROUP; k += LANES) {
            const Floats magic = splat(12582912.f);  // 1.5 x 2^23: adding it rounds to an integer
            const Floats nearest = (load<Floats>(padded + k) * inverse + magic) - magic;
            const Ints values = inverse == 0 ? Ints{} : __builtin_convertvector(nearest, Ints);
            total += values;
            store(integers + k, __builtin_convertvector(values, Values));
        }
        for (int64_t k = 0; k < count; k += 4)
            memcpy(&to[2 * height + (k / 4 * height + row) * SIDE_WORDS], integers + k, sizeof(Value) * 4);
        memcpy(&to[row], &scale, 4);
        to[height + row] = 0;
        for (int i = 0; i < LANES; i++) to[height + row] -= 128 * total[i];
    }

    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end, Floats (&sums)[ROWS][PANELS * VECTORS]) const {
        const int32_t *at = x + row * row_words(inputs) + begin / GROUP * WORDS * ROWS;
        const Int8 *w = weights + panel * PANEL * inputs + begin * PANEL;
        for (; begin < end; begin += GROUP, at += WORDS * ROWS, w += GROUP * PANEL)
            add_group(at, w, std::min(end - begin, GROUP), sums);
    }

#if defined(__AVX512VNNI__)
    // _mm512_dpbusd_epi32, for which GCC 12 would copy the sums to other registers and to memory.
    static __m512i add_products(__m512i sums, __m512i weights, __m512i values) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(values));
        return sums;
    }

    template <int ROWS, int PANELS>
    void add_group(const int32_t *at, const Int8 *w, int64_t count, Floats (&sums)[ROWS][PANELS]) const {
        const float *scales = reinterpret_cast<const float *>(at);
        __m512i dots[ROWS][PANELS];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) dots[i][j] = _mm512_set1_epi32(at[ROWS + i]);
        at += 2 * ROWS;
        for (int64_t k = 0; k < count; k += 4, at += ROWS, w += 4 * PANEL) {
            __m512i lanes[PANELS];
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) {
                __builtin_prefetch(w + j * PANEL * inputs + 4096);
                lanes[j] = _mm512_loadu_si512(w + j * PANEL * inputs);
            }
            // Row by row: the values of all rows together would take the registers of the sums.
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                const __m512i values = _mm512_set1_epi32(at[i]);
#pragma GCC unroll 4
                for (int j = 0; j < PANELS; j++) dots[i][j] = add_products(dots[i][j], lanes[j], values);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) sums[i][j] += scales[i] * __builtin_convertvector((Ints)dots[i][j], Floats);
    }
#else
    // _mm256_add_epi32(sums, _mm256_madd_epi16(weights, values)), whose sums GCC 12 would keep in memory.
    static __m256i add_products(__m256i sums, __m256i weights, __m256i values) {
        __m256i products;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(weights), "x"(values));
        return sums;
    }

    template <int ROWS, int COLUMNS>
    void add_group(const int32_t *at, const Int8 *w, int64_t count, Floats (&sums)[ROWS][COLUMNS]) const {
        // The products of two inputs each take two registers for a row and a vector of outputs.
        constexpr int TOGETHER = ROWS <= 3 ? VECTORS : 1;
#pragma GCC unroll 8
        for (int first = 0; first < COLUMNS; first += TOGETHER) {
            const Int8 *lanes = w + first / VECTORS * PANEL * inputs + first % VECTORS * LANES * 4;
            const int32_t *values = at + 2 * ROWS;
            __m256i dots[ROWS][TOGETHER][2] = {};
            for (int64_t k = 0; k < count; k += 4, lanes += 4 * PANEL, values += 2 * ROWS) {
                if (first % VECTORS == 0) __builtin_prefetch(lanes + 4096);
                __m256i low[TOGETHER], high[TOGETHER];
#pragma GCC unroll 2
                for (int j = 0; j < TOGETHER; j++) {
                    low[j] = _mm256_cvtepu8_epi16(load<__m128i>(lanes + 32 * j));
                    high[j] = _mm256_cvtepu8_epi16(load<__m128i>(lanes + 32 * j + 16));
                }
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    const __m256i four = _mm256_set1_epi64x(load<int64_t>(values + 2 * i));
#pragma GCC unroll 2
                    for (int j = 0; j < TOGETHER; j++) {
                        dots[i][j][0] = add_products(dots[i][j][0], low[j], four);
                        dots[i][j][1] = add_products(dots[i][j][1], high[j], four);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
                for (int j = 0; j < TOGETHER; j++) {
                    const __m256i pairs = _mm256_hadd_epi32(dots[i][j][0], dots[i][j][1]);  // outputs 0 1 4 5 2 3 6 7
                    const Ints whole = (Ints)_mm256_permute4x64_epi64(pairs, 0xd8) + at[ROWS + i];
                    sums[i][first + j] += load<float>(at + i) * __builtin_convertvector(whole, Floats);
                }
        }
    }
#endif
};
#endif

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
    Products products;
    Tiles tiles;
    int64_t outputs;
    float *y;  // [rows, outputs]; holds the sums over the first inputs while the others are missing
    Epilogue epilogue;

    // Adds the inputs [begin, end) for one tile of rows and PANELS panels.
    template <int ROWS, int PANELS>
    void add(int64_t row, int64_t panel, int64_t begin, int64_t end) const {
        Floats sums[ROWS][PANELS * VECTORS];
        const int64_t first = panel * PANEL, columns = std::min<int64_t>(PANELS * PANEL, outputs - first);
        float *out = y + row * outputs + first;
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < PANELS * VECTORS; j++)
                sums[i][j] = begin == 0 ? Floats{} : load_columns(out + i * outputs, columns, j * LANES);
        products.template add<ROWS, PANELS>(row, panel, begin, end, sums);
        const bool is_last = end == products.inputs;
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < PANELS * VECTORS; j++) {
                Floats &value = sums[i][j];
                if (is_last) finish(value, row + i, first, columns, j * LANES);
                store_columns(out + i * outputs, columns, j * LANES, value);
            }
    }

    void finish(Floats &value, int64_t row, int64_t first, int64_t columns, int64_t at) const {
        if (epilogue.scales != nullptr) value *= load_columns(epilogue.scales + first, columns, at);
        if (epilogue.bias != nullptr) value += load_columns(epilogue.bias + first, columns, at);
        value = activate(epilogue.activation, value);
        if (epilogue.clip < INFINITY) {  // NaN stays NaN
            value = value > epilogue.clip ? splat(epilogue.clip) : value;
            value = value < -epilogue.clip ? splat(-epilogue.clip) : value;
        }
        if (epilogue.residual != nullptr)
            value += load_columns(epilogue.residual + row * outputs + first, columns, at);
    }

    // Load and store a vector of a row that may extend beyond the row's last column.
    static Floats load_columns(const float *row, int64_t columns, int64_t at) {
        if (at + LANES <= columns) return load<Floats>(row + at);
        Floats v{};
        if (at < columns) memcpy(&v, row + at, 4 * (columns - at));
        return v;
    }
    static void store_columns(float *row, int64_t columns, int64_t at, const Floats &v) {
        if (at + LANES <= columns) return store(row + at, v);
        if (at < columns) memcpy(row + at, &v, 4 * (columns - at));
    }

    template <int PANELS, int ROWS = PANELS == MAX_PANELS ? FEW_ROWS : MAX_ROWS>
    void add_tile(int64_t tile, int64_t panel, int64_t begin, int64_t end) const {
        if (tiles.height(tile) == ROWS) return add<ROWS, PANELS>(tiles.start(tile), panel, begin, end);
        if constexpr (ROWS > 1) add_tile<PANELS, ROWS - 1>(tile, panel, begin, end);
    }

    template <int PANELS>
    void add_panels(int64_t panel, int64_t last, int64_t tile, int64_t last_tile, int64_t begin, int64_t end) const {
        for (; panel + PANELS <= last; panel += PANELS)
            for (int64_t t = tile; t < last_tile; t++) add_tile<PANELS>(t, panel, begin, end);
        if constexpr (PANELS > 1)
            if (panel < last) add_panels<PANELS / 2>(panel, last, tile, last_tile, begin, end);
    }

    void compute(int64_t panel, int64_t last) const {
        constexpr int64_t TILES = ROW_BLOCK / MAX_ROWS;
        const int64_t block = tiles.count == 1 ? products.inputs : INPUT_BLOCK;
        for (int64_t tile = 0; tile < tiles.count; tile += TILES) {
            const int64_t last_tile = std::min(tiles.count, tile + TILES);
            for (int64_t begin = 0; begin < products.inputs; begin += block) {
                const int64_t end = std::min(products.inputs, begin + block);
                if (tiles.rows <= FEW_ROWS)
                    add_panels<MAX_PANELS>(panel, last, tile, last_tile, begin, end);
                else
                    add_panels<PANELS_OF_MANY_ROWS>(panel, last, tile, last_tile, begin, end);
            }
        }
    }
};

template <class Products, class Weight>
void matmul(const float *x, int64_t rows, const Weight *weights, int64_t outputs, int64_t inputs, float *y,
            const Epilogue &epilogue, Pool &pool) {
    using Packed = typename Products::Packed;
    static thread_local std::unique_ptr<Packed[]> packed;
    static thread_local int64_t capacity = 0;
    if (const int64_t size = Products::packed_size(rows, inputs); size > capacity)
        capacity = 0, packed.reset(), packed.reset(new Packed[size]), capacity = size;
    Packed *const to = packed.get();
    const Tiles tiles(rows);
    pool.run(tiles.count, [&](int64_t i) { Products::pack(x, inputs, tiles.start(i), tiles.height(i), to); });
    const Matmul<Products> product{{to, weights, inputs}, tiles, outputs, y, epilogue};
    const int64_t panels = num_panels(outputs);
    const int64_t panel_bytes = PANEL * inputs * int64_t(sizeof(Weight));
    // About eight pieces for each thread, unless they become too small; a multiple of MAX_PANELS.
    int64_t size = std::max(panels / (8 * pool.size()), PIECE_BYTES / panel_bytes);
    size = std::max<int64_t>(1, size / MAX_PANELS) * MAX_PANELS;
    pool.run((panels + size - 1) / size,
             [&](int64_t i) { product.compute(i * size, std::min(panels, (i + 1) * size)); });
}

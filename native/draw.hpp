// Draws a token at random from a row of logits, as model/sampler.py does: temperature, top-k, top-p and min-p, then the
// Gumbel-max trick with noise from a hash.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));  // half as many lanes
typedef uint32_t HalfWords __attribute__((vector_size(2 * LANES)));

// How a token is drawn from a row.
struct DrawOptions {
    const float *logits;
    uint64_t seed, position;
    int64_t top_k;  // the size of the row keeps all tokens
    double top_p;   // 1 keeps all tokens
    float temperature, min_p;
};

// A token's place in the order by logits, highest first and then by number. The scaled logits are at most 0.
struct Rank {
    uint32_t magnitude;  // the bits of the scaled logit without its sign
    uint32_t token;

    explicit Rank(uint64_t key) : magnitude(uint32_t(key >> 32)), token(uint32_t(key)) {}
    Rank(float scaled, int64_t number) : token(uint32_t(number)) {
        memcpy(&magnitude, &scaled, 4);
        magnitude &= 0x7fffffff;
    }
    uint64_t key() const { return uint64_t(magnitude) << 32 | token; }
    float scaled() const {
        float value;
        memcpy(&value, &magnitude, 4);
        return -value;
    }
};

// What is computed of one row at a time.
class Row {
   public:
    explicit Row(int64_t size) : size(size), scaled(padded(size)), probabilities(padded(size)), members(size) {}

    bool has_size(int64_t other) const { return size == other; }

    int64_t draw(const DrawOptions &options) {
        scale(options.logits, options.temperature);
        return noisiest(options, last_kept(options));
    }

   private:
    static constexpr int SHIFT = 18, BUCKETS = 1 << (31 - SHIFT);  // by the first bits of the magnitude

    int64_t size;
    std::vector<float> scaled, probabilities;  // these are not normalized
    std::vector<uint64_t> members;             // of one bucket, as keys
    std::vector<double> sums = std::vector<double>(BUCKETS);  // of the probabilities in each bucket
    std::vector<int32_t> counts = std::vector<int32_t>(BUCKETS);

    static int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

    void scale(const float *logits, float temperature) {
        constexpr float LOWEST = -std::numeric_limits<float>::infinity();
        const int64_t whole = size / LANES * LANES;
        std::fill(scaled.begin() + whole, scaled.end(), LOWEST);
        std::copy(logits + whole, logits + size, scaled.begin() + whole);
        Floats most = splat(LOWEST);
        for (int64_t i = 0; i < whole; i += LANES) most = max(load_floats(logits + i), most);
        if (whole < size) most = max(load_floats(&scaled[whole]), most);
        const float greatest = highest(most);
        for (int64_t i = 0; i < int64_t(scaled.size()); i += LANES)
            store(&scaled[i], (load_floats(i < whole ? logits + i : &scaled[i]) - greatest) / temperature);
    }

    Rank last_kept(const DrawOptions &options) {
        uint64_t last = Rank(-std::numeric_limits<float>::infinity(), size - 1).key();
        if (options.top_k < size || options.top_p < 1) {
            fill_buckets();
            if (options.top_k < size) last = nth(options.top_k);
            if (options.top_p < 1) last = reaching(options.top_p, last);
        }
        if (options.min_p > 0) last = std::min(last, Rank(float(std::log(double(options.min_p))), size - 1).key());
        return Rank(last);
    }

    static int bucket_of(uint64_t key) { return int(key >> (32 + SHIFT)); }

    void fill_buckets() {
        std::fill(counts.begin(), counts.end(), 0);
        std::fill(sums.begin(), sums.end(), 0);
        for (int64_t i = 0; i < int64_t(scaled.size()); i += LANES)
            store(&probabilities[i], exp(load_floats(&scaled[i])));
        for (int64_t i = 0; i < size; i++) {
            const int bucket = bucket_of(Rank(scaled[i], i).key());
            counts[bucket]++, sums[bucket] += probabilities[i];
        }
    }

    // The keys of a bucket, in no order.
    int64_t gather(int bucket) {
        int64_t count = 0;
        for (int64_t i = 0; i < size && count < counts[bucket]; i++) {
            const uint64_t key = Rank(scaled[i], i).key();
            if (bucket_of(key) == bucket) members[count++] = key;
        }
        return count;
    }

    // The key of the last of the `count` highest tokens.
    uint64_t nth(int64_t count) {
        int bucket = 0;
        for (; count > counts[bucket]; bucket++) count -= counts[bucket];
        const auto end = members.begin() + gather(bucket);
        std::nth_element(members.begin(), members.begin() + count - 1, end);
        return members[count - 1];
    }

    // The key of the last of the fewest tokens that have this share of the probability of those up to `last`.
    uint64_t reaching(double share, uint64_t last) {
        const int last_bucket = bucket_of(last);
        const auto end = members.begin() + gather(last_bucket);
        double in_last = 0, total = 0;
        for (auto key = members.begin(); key < end; key++)
            if (*key <= last) in_last += probabilities[Rank(*key).token];
        for (int bucket = 0; bucket < last_bucket; bucket++) total += sums[bucket];
        total += in_last;
        double before = 0;
        for (int bucket = 0; bucket <= last_bucket; bucket++) {
            const double sum = bucket == last_bucket ? in_last : sums[bucket];
            if (counts[bucket] == 0 || before + sum < share * total) {
                before += sum;
                continue;
            }
            const int64_t count = gather(bucket);
            std::sort(members.begin(), members.begin() + count);
            for (int64_t i = 0; i < count; i++) {
                before += probabilities[Rank(members[i]).token];
                if (before >= share * total || members[i] == last) return members[i];
            }
        }
        return last;  // what was added in another order is a little less
    }

    static Longs mixed(Longs x) {  // splitmix64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31;
    }

    // The token up to `last` that is highest with its noise; the first of the row if none is above -inf.
    int64_t noisiest(const DrawOptions &options, const Rank last) {
        constexpr float LOWEST = -std::numeric_limits<float>::infinity();
        constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;
        const auto mixed_number = [](uint64_t x) { return mixed(Longs{} + x)[0]; };
        Longs input = Longs{} + mixed_number(options.seed + mixed_number(options.position + 1));
        for (int lane = 0; lane < LANES / 2; lane++) input[lane] += STEP * (lane + 1);
        const Longs half_step = Longs{} + STEP * (LANES / 2);
        const float cut = last.scaled();
        float best = LOWEST;
        int64_t chosen = 0;
        for (int64_t i = 0; i < int64_t(scaled.size()); i += LANES, input += 2 * half_step) {
            const Floats values = load_floats(&scaled[i]);
            const Floats kept = values >= cut ? values : splat(LOWEST);
            if (!any(kept + HIGHEST_NOISE > best)) continue;
            const HalfWords halves[] = {__builtin_convertvector(mixed(input), HalfWords),
                                        __builtin_convertvector(mixed(input + half_step), HalfWords)};
            const Words bits = load<Words>(halves);
            const Ints candidates = kept + noise_bound(bits) > best;
            if (!any(candidates)) continue;
            for (int lane = 0; lane < LANES; lane++) {
                if (!candidates[lane] || Rank(kept[lane], i + lane).key() > last.key()) continue;
                const float noisy = kept[lane] + noise(bits[lane]);
                if (noisy > best) best = noisy, chosen = i + lane;
            }
        }
        return chosen;
    }

    static constexpr float HIGHEST_NOISE = 23;  // more than -ln 2^-33

    // Gumbel noise of a uniform number with these bits. The exponential variate is exact near 0, where the winners are.
    static float noise(uint32_t bits) {
        // A 1 would make it -inf, as if the token were not kept, so the largest float below 1 stands for it.
        const double uniform = std::min((float(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
        return float(-std::log(-std::log1p(-uniform)));
    }

    // At least the noise of these bits: -ln(-ln(1 - u)) <= -ln u, and u is more than 2 to the power of the exponent - 32.
    static Floats noise_bound(Words bits) {
        const Ints exponents = ((Ints)__builtin_convertvector(bits, Floats) >> 23) - 127;
        return __builtin_convertvector(32 - exponents, Floats) * 0.69315f;
    }
};

// The token that is drawn from each of the rows, whose logits have this size.
inline void draw(const DrawOptions *options, int64_t rows, int64_t size, int64_t *tokens, Pool &pool) {
    // The memory stays with the thread.
    static thread_local std::vector<Row> workspaces;
    const int64_t pieces = std::min<int64_t>(rows, pool.size());
    if (!workspaces.empty() && !workspaces.front().has_size(size)) workspaces.clear();
    while (int64_t(workspaces.size()) < pieces) workspaces.emplace_back(size);
    std::atomic<int64_t> next{0};
    Row *const own = workspaces.data();  // of this thread, not of the one that takes the piece
    pool.run(pieces, [&](int64_t piece) {
        for (int64_t row; (row = next++) < rows;) tokens[row] = own[piece].draw(options[row]);
    });
}

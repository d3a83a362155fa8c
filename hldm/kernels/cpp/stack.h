// One position through a whole Griffin stack, rows taken L at a time.
#pragma once

#include <type_traits>

#include "lanes.h"

namespace {

// A stack of blocks; its state is written over. hldm.kernels.structs reads this struct, and those of the other kernels.
struct Stack {
    int64_t d, heads, hidden, taps, window, blocks;
    const uint8_t* is_recurrent;
    const float* const* weights;
    const float* rotation;
    float* const* state;
};

// What a group of L rows works with: `rows` of the batch, named by `index`; lanes beyond them hold zeros.
template <int L>
struct Group {
    const Stack& stack;
    const int64_t* index;
    int64_t rows;
    const uint8_t *doc_start, *chunk_start;  // (b)
    float *x, *normed, *temporal, *wide, *wide_up;  // (d, L) three times, (max(hidden, 3 d), L) twice

    Group(const Stack& stack, const int64_t* index, int64_t rows, const uint8_t* doc_start,
          const uint8_t* chunk_start)
        : stack(stack), index(index), rows(rows), doc_start(doc_start), chunk_start(chunk_start) {
        static thread_local std::vector<float> numbers;
        numbers.assign((3 * stack.d + 2 * std::max(stack.hidden, 3 * stack.d)) * L + FLOATS, 0.0f);
        x = numbers.data() + (64 - uintptr_t(numbers.data()) % 64) / sizeof(float);  // a line of the cache
        normed = x + stack.d * L;
        temporal = normed + stack.d * L;
        wide = temporal + stack.d * L;
        wide_up = wide + std::max(stack.hidden, 3 * stack.d) * L;
    }

    // Rows of the batch, `by_row` numbers apart, into (d, L), and back.
    void spread(const float* from, int64_t by_row, float* lanes) const {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < stack.d; i++) lanes[i * L + row] = from[index[row] * by_row + i];
    }
    void collect(const float* lanes, int64_t by_row, float* to) const {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < stack.d; i++) to[index[row] * by_row + i] = lanes[i * L + row];
    }

    // weights: conv, its bias, linear_y, its bias, linear_x, its bias, gates, their bias, a_param, linear_out, its bias
    // state: hidden (b d), taps (b k-1 d)
    void recur(const float* const* weights, float* const* state) {
        const int64_t d = stack.d, k = stack.taps, w = d / stack.heads;
        float *u = wide, *mixed = wide + d * L, *y = wide + 2 * d * L, *gates = wide_up, *carried = wide_up + 2 * d * L;
        float* radius = temporal;
        float keep[L];
        for (int l = 0; l < L; l++) keep[l] = l < rows && doc_start[index[l]] ? 0.0f : 1.0f;
        multiply<L>(weights[2], normed, y, d, d);
        linear<L>(weights + 4, normed, u, d, d);
        const float* newest = weights[0] + (k - 1) * d;
        for (int64_t i = 0; i < d; i++)
            for (int l = 0; l < L; l++) mixed[i * L + l] = weights[1][i] + newest[i] * u[i * L + l];
        for (int64_t tap = 0; tap < k - 1; tap++) {
            spread(state[1] + tap * d, (k - 1) * d, carried);
            for (int64_t i = 0; i < d; i++)
                for (int l = 0; l < L; l++) mixed[i * L + l] += weights[0][tap * d + i] * keep[l] * carried[i * L + l];
        }
        for (int64_t row = 0; k > 1 && row < rows; row++) {
            float* taps = state[1] + index[row] * (k - 1) * d;
            for (int64_t i = 0; i < (k - 2) * d; i++) taps[i] = doc_start[index[row]] ? 0.0f : taps[d + i];
        }
        if (k > 1) collect(u, (k - 1) * d, state[1] + (k - 2) * d);

        for (int64_t i = 0; i < d; i++) radius[i] = -8.0f * softplus(weights[8][i]);  // Griffin, equation 4
        spread(state[0], d, carried);
        for (int64_t head = 0; head < stack.heads; head++) {
            float *input = gates, *decay = gates + w * L;
            multiply_transposed<L>(weights[6] + head * w * 2 * w, mixed + head * w * L, gates, 2 * w, w);
            for (int64_t j = 0; j < w; j++) {
                const int64_t i = head * w + j;
                const float *in = input + j * L, *out = decay + j * L, *mixed_i = mixed + i * L;
                float* hidden = carried + i * L;
#pragma omp simd
                for (int l = 0; l < L; l++) {
                    const float e = exp_minus_one(radius[i] * sigmoid(out[l] + weights[7][d + i]));
                    const float multiplier = std::sqrt(keep[l] * (-e * (2 + e)) + (1 - keep[l]));
                    const float gated = sigmoid(in[l] + weights[7][i]) * mixed_i[l];
                    hidden[l] = keep[l] * (1 + e) * hidden[l] + multiplier * gated;
                }
            }
        }
        collect(carried, d, state[0]);
        add_bias<L>(weights[3], y, d);
        gelu_gate(y, carried, d * L);
        linear<L>(weights + 9, y, temporal, d, d);
    }

    // weights: query, key, value, linear_out, its bias;  rotation (s+1, e/4, 2): cos and sin by distance
    // state: keys, values (b s h e), live (b s)
    void attend(const float* const* weights, float* const* state) {
        const int64_t d = stack.d, s = stack.window, e = d / stack.heads, pairs = e / 4;
        float *q = wide, *k = wide + d * L, *v = wide + 2 * d * L, *y = wide_up;
        multiply<L>(weights[0], normed, q, d, d);
        multiply<L>(weights[1], normed, k, d, d);
        multiply<L>(weights[2], normed, v, d, d);
        std::vector<float> scores((s + 1) * stack.heads), turned(d), own(d), attended(d);
        std::vector<float> newest_key(d), newest_value(d);
        for (int64_t row = 0; row < rows; row++) {
            const bool opens = doc_start[index[row]] || chunk_start[index[row]];
            const int64_t at = index[row] * s;
            float *keys = state[0] + at * d, *values = state[1] + at * d;
            uint8_t* live = (uint8_t*)state[2] + at;
            for (int64_t i = 0; i < d; i++) {
                newest_key[i] = k[i * L + row];
                newest_value[i] = v[i * L + row];
                own[i] = q[i * L + row] / std::sqrt(float(e));
            }

            // Position j of s + 1, the last being its own, is s - j back; attended over the live ones.
            const auto seen = [&](int64_t j) { return j == s || (!opens && live[j]); };
            for (int64_t j = 0; j <= s; j++) {
                if (!seen(j)) continue;
                const float* key = j == s ? newest_key.data() : keys + j * d;
                const float* turn = stack.rotation + (s - j) * pairs * 2;
                for (int64_t head = 0; head < stack.heads; head++) {
                    const float* o = own.data() + head * e;
                    float* r = turned.data();
                    for (int64_t p = 0; p < pairs; p++) {
                        r[2 * p] = o[2 * p] * turn[2 * p] - o[2 * p + 1] * turn[2 * p + 1];
                        r[2 * p + 1] = o[2 * p + 1] * turn[2 * p] + o[2 * p] * turn[2 * p + 1];
                    }
                    std::copy(o + 2 * pairs, o + e, r + 2 * pairs);
                    dot_rows<1>(key + head * e, r, &scores[head * (s + 1) + j], e);
                }
            }
            std::fill(attended.begin(), attended.end(), 0.0f);
            for (int64_t head = 0; head < stack.heads; head++) {
                float *score = &scores[head * (s + 1)], *out = attended.data() + head * e;
                float largest = score[s], total = 0;
                for (int64_t j = 0; j < s; j++)
                    if (seen(j)) largest = std::max(largest, score[j]);
                for (int64_t j = 0; j <= s; j++) {
                    if (!seen(j)) continue;
                    const float weight = exponential(score[j] - largest);
                    const float* value = (j == s ? newest_value.data() : values + j * d) + head * e;
                    total += weight;
                    for (int64_t i = 0; i < e; i++) out[i] += weight * value[i];
                }
                for (int64_t i = 0; i < e; i++) out[i] /= total;
            }
            for (int64_t i = 0; i < d; i++) y[i * L + row] = attended[i];

            // One step back for everyone, last of all: this is the memory that was read above.
            std::copy(newest_key.begin(), newest_key.end(), std::copy(keys + d, keys + s * d, keys));
            std::copy(newest_value.begin(), newest_value.end(), std::copy(values + d, values + s * d, values));
            for (int64_t j = 1; j < s; j++) live[j - 1] = !opens && live[j];
            live[s - 1] = 1;
        }
        linear<L>(weights + 3, y, temporal, d, d);
    }

    // weights: gate, up, down
    void mlp(const float* const* weights) {
        multiply<L>(weights[0], normed, wide, stack.hidden, stack.d);
        multiply<L>(weights[1], normed, wide_up, stack.hidden, stack.d);
        gelu_gate(wide, wide_up, stack.hidden * L);
        multiply<L>(weights[2], wide, temporal, stack.d, stack.hidden);
    }

    // From x to `normed`, by way of all blocks.
    void run() {
        const int64_t d = stack.d;
        const float* const* weights = stack.weights;
        float* const* state = stack.state;
        for (int64_t block = 0; block < stack.blocks; block++) {
            normalise<L>(x, *weights++, normed, d);
            if (stack.is_recurrent[block]) {
                recur(weights, state);
                weights += 11, state += 2;
            } else {
                attend(weights, state);
                weights += 5, state += 3;
            }
            for (int64_t i = 0; i < d * L; i++) x[i] += temporal[i];
            normalise<L>(x, *weights++, normed, d);
            mlp(weights);
            weights += 3;
            for (int64_t i = 0; i < d * L; i++) x[i] += temporal[i];
        }
        normalise<L>(x, *weights, normed, d);
    }
};

// Take rows in groups of as many as vectors hold, the last of them smaller: work(lanes, first row, rows).
template <typename Work>
void in_groups(int64_t rows, const Work& work) {
    for (int64_t first = 0; first < rows;) {
        const int64_t left = rows - first;
        const auto take = [&](auto lanes) {
            const int64_t count = std::min<int64_t>(left, decltype(lanes)::value);
            work(lanes, first, count);
            first += count;
        };
        if (left == 1)
            take(std::integral_constant<int, 1>());
        else if (left <= 8)
            take(std::integral_constant<int, 8>());
        else if (left <= 16)
            take(std::integral_constant<int, 16>());
        else
            take(std::integral_constant<int, 32>());
    }
}

// Split rows over threads, in shares of 8 at least: work(first row, rows).
template <typename Work>
void over_threads(int64_t rows, int64_t threads, const Work& work) {
    threads = std::max<int64_t>(threads, 1);
    const int64_t share = std::max<int64_t>(8, (rows + threads - 1) / threads);
    const int64_t shares = (rows + share - 1) / share;
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, shares)))
    for (int64_t i = 0; i < shares; i++) work(i * share, std::min(share, rows - i * share));
}

}  // namespace

// One position through a whole Griffin stack: weights are read where torch keeps them, (out in) row by row. Rows of the
// batch are taken L at a time; what flows between layers is (features, L), so that a weight meets all of its rows in one
// vector instruction. For L = 1 the vectors run along the features instead.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "elementwise.h"

namespace {

// What it is called with, in hldm/kernels/stack.py's order.
struct Shape {
    int64_t batch, d, heads, hidden, taps, window, blocks, threads;
};

// A stack of blocks, in hldm/kernels/stack.py's order; its state is written over.
struct Stack {
    Shape shape;
    const uint8_t* is_recurrent;
    const float* const* weights;
    const float* rotation;
    float* const* state;
};

constexpr int64_t FLOATS = 16;  // of a vector; compilers split it where the machine's are shorter

template <int N>
struct Vector {
    typedef float type __attribute__((vector_size(4 * N), aligned(4), may_alias));
};

template <int N>
inline typename Vector<N>::type& vector_at(float* p) {
    return *reinterpret_cast<typename Vector<N>::type*>(p);
}

template <int N>
inline const typename Vector<N>::type& vector_at(const float* p) {
    return *reinterpret_cast<const typename Vector<N>::type*>(p);
}

// y[o + r] = sum_i w[o + r, i] x[i] for r < R, x (in, L), by L / N vectors a row; w's strides: over outputs, inputs
template <int L, int R>
inline void multiply_rows(const float* w, int64_t by_output, int64_t by_input, const float* x, float* y, int64_t in) {
    constexpr int N = L < FLOATS ? L : FLOATS;
    typedef typename Vector<N>::type V;
    V sum[R][L / N];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < L / N; v++) sum[r][v] = V{};
    for (int64_t i = 0; i < in; i++) {
        V x_i[L / N];
        for (int v = 0; v < L / N; v++) x_i[v] = vector_at<N>(x + i * L + v * N);
        for (int r = 0; r < R; r++) {
            const float w_ri = w[r * by_output + i * by_input];
            for (int v = 0; v < L / N; v++) sum[r][v] += w_ri * x_i[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < L / N; v++) vector_at<N>(y + r * L + v * N) = sum[r][v];
}

// The same for one row of the batch and weights (out in): dot products, their vectors along the inputs.
template <int R>
inline void dot_rows(const float* w, const float* x, float* y, int64_t in) {
    typedef Vector<FLOATS>::type V;
    V sum[R];
    for (int r = 0; r < R; r++) sum[r] = V{};
    int64_t i = 0;
    for (; i + FLOATS <= in; i += FLOATS) {
        const V x_i = vector_at<FLOATS>(x + i);
        for (int r = 0; r < R; r++) sum[r] += vector_at<FLOATS>(w + r * in + i) * x_i;
    }
    for (int r = 0; r < R; r++) {
        float total = 0;
        for (int64_t rest = i; rest < in; rest++) total += w[r * in + rest] * x[rest];
        Vector<8>::type half = vector_at<8>((const float*)&sum[r]) + vector_at<8>((const float*)&sum[r] + 8);
        for (int j = 0; j < 8; j++) total += half[j];
        y[r] = total;
    }
}

// y (out, L) = weight (out in) x (in, L)
template <int L>
void multiply(const float* weight, const float* x, float* y, int64_t out, int64_t in) {
    constexpr int R = L == 1 ? 4 : L <= FLOATS ? 8 : 4;  // as many sums as registers hold
    int64_t o = 0;
    if constexpr (L == 1) {
        for (; o + R <= out; o += R) dot_rows<R>(weight + o * in, x, y + o, in);
        for (; o < out; o++) dot_rows<1>(weight + o * in, x, y + o, in);
    } else {
        for (; o + R <= out; o += R) multiply_rows<L, R>(weight + o * in, in, 1, x, y + o * L, in);
        for (; o < out; o++) multiply_rows<L, 1>(weight + o * in, in, 1, x, y + o * L, in);
    }
}

// y (out, L) = x (in, L) times weight (in out), as the gates keep theirs
template <int L>
void multiply_transposed(const float* weight, const float* x, float* y, int64_t out, int64_t in) {
    if constexpr (L == 1) {
        std::fill(y, y + out, 0.0f);
        for (int64_t i = 0; i < in; i++)
            for (int64_t o = 0; o < out; o++) y[o] += x[i] * weight[i * out + o];
    } else {
        constexpr int R = L <= FLOATS ? 8 : 4;
        int64_t o = 0;
        for (; o + R <= out; o += R) multiply_rows<L, R>(weight + o, 1, out, x, y + o * L, in);
        for (; o < out; o++) multiply_rows<L, 1>(weight + o, 1, out, x, y + o * L, in);
    }
}

// y = x / sqrt(mean x^2 + 1e-6) (1 + scale)
template <int L>
void normalise(const float* x, const float* scale, float* y, int64_t d) {
    float inverse[L] = {};
    if constexpr (L == 1) {
        Vector<FLOATS>::type sum = {};
        int64_t i = 0;
        for (; i + FLOATS <= d; i += FLOATS) sum += vector_at<FLOATS>(x + i) * vector_at<FLOATS>(x + i);
        for (int j = 0; j < FLOATS; j++) inverse[0] += sum[j];
        for (; i < d; i++) inverse[0] += x[i] * x[i];
    } else {
        for (int64_t i = 0; i < d; i++)
            for (int l = 0; l < L; l++) inverse[l] += x[i * L + l] * x[i * L + l];
    }
    for (int l = 0; l < L; l++) inverse[l] = 1.0f / std::sqrt(inverse[l] / d + 1e-6f);
    for (int64_t i = 0; i < d; i++)
        for (int l = 0; l < L; l++) y[i * L + l] = x[i * L + l] * inverse[l] * (1.0f + scale[i]);
}

// (x - mean) / sqrt(variance + 1e-5), as torch's layer_norm without weights
template <int L>
void standardise(const float* x, float* y, int64_t d) {
    for (int l = 0; l < L; l++) {
        float mean = 0, square = 0;
        for (int64_t i = 0; i < d; i++) mean += x[i * L + l];
        mean /= d;
        for (int64_t i = 0; i < d; i++) square += (x[i * L + l] - mean) * (x[i * L + l] - mean);
        const float inverse = 1.0f / std::sqrt(square / d + 1e-5f);
        for (int64_t i = 0; i < d; i++) y[i * L + l] = (x[i * L + l] - mean) * inverse;
    }
}

template <int L>
void add_bias(const float* bias, float* y, int64_t d) {
    for (int64_t i = 0; i < d; i++)
        for (int l = 0; l < L; l++) y[i * L + l] += bias[i];
}

// y = gelu(y) * other
void gelu_gate(float* __restrict y, const float* __restrict other, int64_t numbers) {
#pragma omp simd
    for (int64_t i = 0; i < numbers; i++) y[i] = gelu(y[i]) * other[i];
}

// y = gelu(y), as nn.GELU
inline void gelu_all(float* y, int64_t numbers) {
#pragma omp simd
    for (int64_t i = 0; i < numbers; i++) y[i] = exact_gelu(y[i]);
}

// Rows of `width` numbers, one after the other, into (width, L), and back.
template <int L>
void into_lanes(const float* from, int64_t rows, int64_t width, float* lanes) {
    std::fill(lanes, lanes + width * L, 0.0f);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) lanes[i * L + row] = from[row * width + i];
}

template <int L>
void from_lanes(const float* lanes, int64_t rows, int64_t width, float* to) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) to[row * width + i] = lanes[i * L + row];
}

// parameters: weight and bias, of an nn.Linear
template <int L>
void linear(const float* const* parameters, const float* x, float* y, int64_t out, int64_t in) {
    multiply<L>(parameters[0], x, y, out, in);
    add_bias<L>(parameters[1], y, out);
}

// parameters: weight and bias, of an nn.LayerNorm
template <int L>
void layer_norm(const float* const* parameters, const float* x, float* y, int64_t d) {
    standardise<L>(x, y, d);
    for (int64_t i = 0; i < d; i++)
        for (int l = 0; l < L; l++) y[i * L + l] = y[i * L + l] * parameters[0][i] + parameters[1][i];
}

// What a group of L rows works with: `rows` of the batch, named by `index`; lanes beyond them hold zeros. The state
// afterwards may be written over the state before.
template <int L>
struct Group {
    const Shape& shape;
    const int64_t* index;
    int64_t rows;
    const uint8_t *doc_start, *chunk_start;  // (b)
    float *x, *normed, *temporal, *wide, *wide_up;  // (d, L) three times, (max(hidden, 3 d), L) twice

    Group(const Shape& shape, const int64_t* index, int64_t rows, const uint8_t* doc_start,
          const uint8_t* chunk_start)
        : shape(shape), index(index), rows(rows), doc_start(doc_start), chunk_start(chunk_start) {
        static thread_local std::vector<float> numbers;
        numbers.assign((3 * shape.d + 2 * std::max(shape.hidden, 3 * shape.d)) * L + FLOATS, 0.0f);
        x = numbers.data() + (64 - uintptr_t(numbers.data()) % 64) / sizeof(float);  // a line of the cache
        normed = x + shape.d * L;
        temporal = normed + shape.d * L;
        wide = temporal + shape.d * L;
        wide_up = wide + std::max(shape.hidden, 3 * shape.d) * L;
    }

    // Rows of the batch, `by_row` numbers apart, into (d, L), and back.
    void spread(const float* from, int64_t by_row, float* lanes) const {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < shape.d; i++) lanes[i * L + row] = from[index[row] * by_row + i];
    }
    void collect(const float* lanes, int64_t by_row, float* to) const {
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < shape.d; i++) to[index[row] * by_row + i] = lanes[i * L + row];
    }

    // weights: linear_y, its bias, linear_x, its bias, conv, its bias, gates, their bias, a_param, linear_out, its bias
    // state: hidden (b d), taps (b k-1 d)
    void recur(const float* const* weights, const float* const* state, float* const* after) {
        const int64_t d = shape.d, k = shape.taps, w = d / shape.heads;
        float *u = wide, *mixed = wide + d * L, *y = wide + 2 * d * L, *gates = wide_up, *carried = wide_up + 2 * d * L;
        float* radius = temporal;
        float keep[L];
        for (int l = 0; l < L; l++) keep[l] = l < rows && doc_start[index[l]] ? 0.0f : 1.0f;
        multiply<L>(weights[0], normed, y, d, d);
        multiply<L>(weights[2], normed, u, d, d);
        add_bias<L>(weights[3], u, d);
        const float* newest = weights[4] + (k - 1) * d;
        for (int64_t i = 0; i < d; i++)
            for (int l = 0; l < L; l++) mixed[i * L + l] = weights[5][i] + newest[i] * u[i * L + l];
        for (int64_t tap = 0; tap < k - 1; tap++) {
            spread(state[1] + tap * d, (k - 1) * d, carried);
            for (int64_t i = 0; i < d; i++)
                for (int l = 0; l < L; l++) mixed[i * L + l] += weights[4][tap * d + i] * keep[l] * carried[i * L + l];
        }
        for (int64_t row = 0; k > 1 && row < rows; row++) {
            const float* taps = state[1] + index[row] * (k - 1) * d;
            float* taps_after = after[1] + index[row] * (k - 1) * d;
            for (int64_t i = 0; i < (k - 2) * d; i++) taps_after[i] = doc_start[index[row]] ? 0.0f : taps[d + i];
        }
        if (k > 1) collect(u, (k - 1) * d, after[1] + (k - 2) * d);

        for (int64_t i = 0; i < d; i++) radius[i] = -8.0f * softplus(weights[8][i]);  // Griffin, equation 4
        spread(state[0], d, carried);
        for (int64_t head = 0; head < shape.heads; head++) {
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
        collect(carried, d, after[0]);
        add_bias<L>(weights[1], y, d);
        gelu_gate(y, carried, d * L);
        multiply<L>(weights[9], y, temporal, d, d);
        add_bias<L>(weights[10], temporal, d);
    }

    // The newer s - 1 of s rows of d numbers, moved to the front of `to`; returns the place of a new last one.
    static float* push(const float* from, float* to, int64_t s, int64_t d) {
        std::memmove(to, from + d, (s - 1) * d * sizeof(float));
        return to + (s - 1) * d;
    }

    // weights: query, key, value, linear_out, its bias;  rotation (s+1, e/4, 2): cos and sin by distance
    // state: keys, values (b s h e), live (b s)
    void attend(const float* const* weights, const float* const* state, float* const* after, const float* rotation) {
        const int64_t d = shape.d, s = shape.window, e = d / shape.heads, pairs = e / 4;
        float *q = wide, *k = wide + d * L, *v = wide + 2 * d * L, *y = wide_up;
        multiply<L>(weights[0], normed, q, d, d);
        multiply<L>(weights[1], normed, k, d, d);
        multiply<L>(weights[2], normed, v, d, d);
        std::vector<float> scores((s + 1) * shape.heads), turned(d), own(d), attended(d);
        std::vector<float> newest_key(d), newest_value(d);
        for (int64_t row = 0; row < rows; row++) {
            const bool opens = doc_start[index[row]] || chunk_start[index[row]];
            const int64_t at = index[row] * s;
            const float *keys = state[0] + at * d, *values = state[1] + at * d;
            const uint8_t* live = (const uint8_t*)state[2] + at;
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
                const float* turn = rotation + (s - j) * pairs * 2;
                for (int64_t head = 0; head < shape.heads; head++) {
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
            for (int64_t head = 0; head < shape.heads; head++) {
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

            // One step back for everyone, last of all: this may be the memory that was read above.
            uint8_t* live_after = (uint8_t*)after[2] + at;
            std::copy(newest_key.begin(), newest_key.end(), push(keys, after[0] + at * d, s, d));
            std::copy(newest_value.begin(), newest_value.end(), push(values, after[1] + at * d, s, d));
            for (int64_t j = 1; j < s; j++) live_after[j - 1] = !opens && live[j];
            live_after[s - 1] = 1;
        }
        multiply<L>(weights[3], y, temporal, d, d);
        add_bias<L>(weights[4], temporal, d);
    }

    // weights: gate, up, down
    void mlp(const float* const* weights) {
        multiply<L>(weights[0], normed, wide, shape.hidden, shape.d);
        multiply<L>(weights[1], normed, wide_up, shape.hidden, shape.d);
        gelu_gate(wide, wide_up, shape.hidden * L);
        multiply<L>(weights[2], wide, temporal, shape.d, shape.hidden);
    }

    // From x to `normed`, by way of all blocks.
    void run(const uint8_t* is_recurrent, const float* const* weights, const float* rotation,
             const float* const* state, float* const* after) {
        const int64_t d = shape.d;
        for (int64_t block = 0; block < shape.blocks; block++) {
            normalise<L>(x, *weights++, normed, d);
            if (is_recurrent[block]) {
                recur(weights, state, after);
                weights += 11, state += 2, after += 2;
            } else {
                attend(weights, state, after, rotation);
                weights += 5, state += 3, after += 3;
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

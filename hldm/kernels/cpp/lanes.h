// Layers on rows of a batch taken L at a time: what flows between layers is (features, L), so that a weight meets all of
// its rows in one vector instruction. For L = 1 the vectors run along the features instead. Weights are read where torch
// keeps them, (out in) row by row.
#pragma once

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace {

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
        // the next R rows: a model does not fit in the second cache (measured: 8 % of writing one row)
        for (int r = 0; r < R; r++) __builtin_prefetch(w + (R + r) * in + i);
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

struct Seen {
    int64_t place;
    float bias;
};

// softmax(q k / sqrt(e) + bias) v over the places seen of keys and values (n e); over the query (e, L) in a lane
template <int L>
void attend_to(const std::vector<Seen>& seen, const float* key, const float* value, int64_t e, float* query) {
    static thread_local std::vector<float> numbers;
    numbers.assign(2 * e + seen.size(), 0.0f);
    float *own = numbers.data(), *sum = own + e, *score = sum + e;
    const float scale = 1.0f / std::sqrt(float(e));
    for (int64_t i = 0; i < e; i++) own[i] = query[i * L] * scale;
    float largest = -INFINITY, total = 0;
    for (size_t j = 0; j < seen.size(); j++) {
        dot_rows<1>(key + seen[j].place * e, own, &score[j], e);
        largest = std::max(largest, score[j] += seen[j].bias);
    }
    for (size_t j = 0; j < seen.size(); j++) {
        const float weight = exponential(score[j] - largest);
        total += weight;
        for (int64_t i = 0; i < e; i++) sum[i] += weight * value[seen[j].place * e + i];
    }
    for (int64_t i = 0; i < e; i++) query[i * L] = sum[i] / total;
}

}  // namespace

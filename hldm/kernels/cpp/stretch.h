// Several positions of one row through a whole Griffin stack in one pass: what a step costs is to read the weights, and
// here they are read once for all positions. Positions lie one after the other, `by` numbers apart, and each is computed
// as if it were alone: the same operations in the same order, so that a pass of any length gives the same bits.
#pragma once

#include "stack.h"

namespace {

constexpr int64_t MOST = 8;             // positions of a pass: as many sums as registers hold
constexpr int64_t PANEL = 2 * FLOATS;   // outputs side by side, by hldm.kernels.panels

inline int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// y (k, out) = x (k, in) times a weight in panels (out / PANEL, in, PANEL); y has room for padded(out) a position
template <int K>
void multiply_panels(const float* w, const float* x, int64_t by_x, float* y, int64_t by_y, int64_t out, int64_t in) {
    typedef Vector<FLOATS>::type V;
    for (int64_t o = 0; o < out; o += PANEL) {
        V sum[K][2];
        for (int k = 0; k < K; k++) sum[k][0] = sum[k][1] = V{};
        for (int64_t i = 0; i < in; i++, w += PANEL) {
            __builtin_prefetch(w + FLOATS * PANEL);
            __builtin_prefetch(w + FLOATS * PANEL + FLOATS);
            const V left = vector_at<FLOATS>(w), right = vector_at<FLOATS>(w + FLOATS);
            for (int k = 0; k < K; k++) {
                sum[k][0] += x[k * by_x + i] * left;
                sum[k][1] += x[k * by_x + i] * right;
            }
        }
        for (int k = 0; k < K; k++)
            for (int half = 0; half < 2; half++) vector_at<FLOATS>(y + k * by_y + o + half * FLOATS) = sum[k][half];
    }
}

inline void multiply_all(const float* w, const float* x, int64_t by_x, float* y, int64_t by_y, int64_t out, int64_t in,
                         int64_t positions) {
    typedef void Product(const float*, const float*, int64_t, float*, int64_t, int64_t, int64_t);
    static constexpr Product* products[MOST] = {multiply_panels<1>, multiply_panels<2>, multiply_panels<3>,
                                                multiply_panels<4>, multiply_panels<5>, multiply_panels<6>,
                                                multiply_panels<7>, multiply_panels<8>};
    products[positions - 1](w, x, by_x, y, by_y, out, in);
}

// parameters: weight in panels, and bias
inline void linear_all(const float* const* parameters, const float* x, int64_t by_x, float* y, int64_t by_y, int64_t out,
                       int64_t in, int64_t positions) {
    multiply_all(parameters[0], x, by_x, y, by_y, out, in, positions);
    for (int64_t k = 0; k < positions; k++)
        for (int64_t i = 0; i < out; i++) y[k * by_y + i] += parameters[1][i];
}

// One row of a stack whose weights are in panels. `run` leaves the state as it is; `commit` takes in some positions of
// what was run, and the others have never been.
struct Stretch {
    const Stack& stack;
    int64_t row, by, count = 0;  // of the last pass
    bool doc_start = false, chunk_start = false;  // of its first position
    float *x, *normed, *temporal, *wide, *wide_up, *gates;
    float* kept;  // of each block two of (MOST by): states and inputs, or keys and values

    // memory: to work with, whatever it holds
    Stretch(const Stack& stack, int64_t row, std::vector<float>& memory) : stack(stack), row(row), by(padded(stack.d)) {
        const int64_t most = padded(std::max(stack.hidden, 2 * stack.d));
        const int64_t gated = stack.heads * padded(2 * (stack.d / stack.heads));
        memory.resize(std::max<size_t>(memory.size(), MOST * (3 * by + 2 * most + gated + 2 * stack.blocks * by) + FLOATS));
        x = memory.data() + (64 - uintptr_t(memory.data()) % 64) / sizeof(float);
        normed = x + MOST * by;
        temporal = normed + MOST * by;
        wide = temporal + MOST * by;
        wide_up = wide + MOST * most;
        gates = wide_up + MOST * most;
        kept = gates + MOST * gated;
    }

    float* kept_of(int64_t block) const { return kept + 2 * block * MOST * by; }

    // parameters and state: as those of Group::recur, but log a_t = radius r in place of a_param
    void recur(const float* const* weights, float* const* state, float* hidden) {
        const int64_t d = stack.d, taps = stack.taps, w = d / stack.heads, by_head = padded(2 * w);
        float *y = wide, *mixed = wide_up, *u = hidden + MOST * by;
        linear_all(weights + 2, normed, by, y, by, d, d, count);
        linear_all(weights + 4, normed, by, u, by, d, d, count);
        for (int64_t k = 0; k < count; k++) {
            float* __restrict m = mixed + k * by;
            const float *newest = weights[0] + (taps - 1) * d, *u_k = u + k * by;
            for (int64_t i = 0; i < d; i++) m[i] = weights[1][i] + newest[i] * u_k[i];
            for (int64_t tap = 0; tap < taps - 1; tap++) {
                const int64_t at = k - (taps - 1) + tap;  // below 0: before this pass
                if (at < 0 && doc_start) continue;
                const float* from = at < 0 ? state[1] + (row * (taps - 1) + at + taps - 1) * d : u + at * by;
                for (int64_t i = 0; i < d; i++) m[i] += weights[0][tap * d + i] * from[i];
            }
        }
        for (int64_t head = 0; head < stack.heads; head++)
            multiply_all(weights[6] + head * by_head * w, mixed + head * w, by, gates + head * by_head,
                         stack.heads * by_head, 2 * w, w, count);
        for (int64_t k = 0; k < count; k++) {
            const float keep = k == 0 && doc_start ? 0.0f : 1.0f;
            const float* before = k ? hidden + (k - 1) * by : state[0] + row * d;
            for (int64_t head = 0; head < stack.heads; head++) {
                const float *in = gates + (k * stack.heads + head) * by_head, *out = in + w, *was = before + head * w;
                const float *m = mixed + k * by + head * w, *radius = weights[8] + head * w;
                const float *in_bias = weights[7] + head * w, *out_bias = in_bias + d;
                float* __restrict now = hidden + k * by + head * w;
#pragma omp simd
                for (int64_t j = 0; j < w; j++) {
                    const float e = exp_minus_one(radius[j] * sigmoid(out[j] + out_bias[j]));
                    const float multiplier = std::sqrt(keep * (-e * (2 + e)) + (1 - keep));
                    now[j] = keep * (1 + e) * was[j] + multiplier * (sigmoid(in[j] + in_bias[j]) * m[j]);
                }
            }
            gelu_gate(y + k * by, hidden + k * by, d);
        }
        linear_all(weights + 9, y, by, temporal, by, d, d, count);
    }

    // parameters and state: as those of Group::attend
    void attend(const float* const* weights, float* const* state, float* keys) {
        const int64_t d = stack.d, s = stack.window, e = d / stack.heads, pairs = e / 4;
        float *q = wide, *y = wide_up, *values = keys + MOST * by;
        multiply_all(weights[0], normed, by, q, by, d, d, count);
        multiply_all(weights[1], normed, by, keys, by, d, d, count);
        multiply_all(weights[2], normed, by, values, by, d, d, count);
        const float *old_keys = state[0] + row * s * d, *old_values = state[1] + row * s * d;
        const uint8_t* live = (const uint8_t*)state[2] + row * s;
        const bool opens = doc_start || chunk_start;
        static thread_local std::vector<float> scores, turned;
        static thread_local std::vector<std::pair<const float*, const float*>> seen;
        scores.resize(s + 1), turned.resize(d);
        for (int64_t k = 0; k < count; k++) {
            float *own = q + k * by, *out = y + k * by;
            for (int64_t i = 0; i < d; i++) own[i] = own[i] / std::sqrt(float(e));
            // from the oldest to its own; the one that is `distance` back is turned by that
            std::vector<float>& score = scores;
            seen.clear();
            std::vector<float>& r = turned;
            static thread_local std::vector<int64_t> distance;
            distance.clear();
            for (int64_t j = k; j < s && !opens; j++)
                if (live[j]) seen.push_back({old_keys + j * d, old_values + j * d}), distance.push_back(s - j + k);
            for (int64_t j = std::max<int64_t>(0, k - s); j <= k; j++)
                seen.push_back({keys + j * by, values + j * by}), distance.push_back(k - j);
            const int64_t n = int64_t(seen.size());
            std::fill(out, out + d, 0.0f);
            for (int64_t head = 0; head < stack.heads; head++) {
                const float* o = own + head * e;
                float largest = -INFINITY, total = 0;
                for (int64_t j = 0; j < n; j++) {
                    const float* turn = stack.rotation + distance[j] * pairs * 2;
                    for (int64_t p = 0; p < pairs; p++) {
                        r[2 * p] = o[2 * p] * turn[2 * p] - o[2 * p + 1] * turn[2 * p + 1];
                        r[2 * p + 1] = o[2 * p + 1] * turn[2 * p] + o[2 * p] * turn[2 * p + 1];
                    }
                    std::copy(o + 2 * pairs, o + e, r.data() + 2 * pairs);
                    dot_rows<1>(seen[j].first + head * e, r.data(), &score[j], e);
                    largest = std::max(largest, score[j]);
                }
                float* __restrict mean = out + head * e;
                for (int64_t j = 0; j < n; j++) {
                    const float weight = exponential(score[j] - largest);
                    const float* value = seen[j].second + head * e;
                    total += weight;
                    for (int64_t i = 0; i < e; i++) mean[i] += weight * value[i];
                }
                for (int64_t i = 0; i < e; i++) mean[i] /= total;
            }
        }
        linear_all(weights + 3, y, by, temporal, by, d, d, count);
    }

    void mlp(const float* const* weights) {
        const int64_t by_wide = padded(stack.hidden);
        multiply_all(weights[0], normed, by, wide, by_wide, stack.hidden, stack.d, count);
        multiply_all(weights[1], normed, by, wide_up, by_wide, stack.hidden, stack.d, count);
        for (int64_t k = 0; k < count; k++) gelu_gate(wide + k * by_wide, wide_up + k * by_wide, stack.hidden);
        multiply_all(weights[2], wide, by_wide, temporal, by, stack.d, stack.hidden, count);
    }

    void normalise_all(const float* scale) {
        for (int64_t k = 0; k < count; k++) normalise<1>(x + k * by, scale, normed + k * by, stack.d);
    }
    void add_branch() {
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = 0; i < stack.d; i++) x[k * by + i] += temporal[k * by + i];
    }

    // From x to `normed`, `positions` of them. opens: the first opens a document, a chunk.
    void run(int64_t positions, bool opens_document, bool opens_chunk) {
        count = positions, doc_start = opens_document, chunk_start = opens_chunk;
        const float* const* weights = stack.weights;
        float* const* state = stack.state;
        for (int64_t block = 0; block < stack.blocks; block++) {
            normalise_all(*weights++);
            if (stack.is_recurrent[block]) {
                recur(weights, state, kept_of(block));
                weights += 11, state += 2;
            } else {
                attend(weights, state, kept_of(block));
                weights += 5, state += 3;
            }
            add_branch();
            normalise_all(*weights++);
            mlp(weights);
            weights += 3;
            add_branch();
        }
        normalise_all(*weights);
    }

    // Move `have` numbered rows of d floats on by `count` new ones, which lie `by` apart.
    void shift(float* rows, int64_t have, const float* fresh, int64_t fresh_count) const {
        const int64_t d = stack.d, stay = std::max<int64_t>(0, have - fresh_count);
        std::memmove(rows, rows + (have - stay) * d, stay * d * sizeof(float));
        for (int64_t j = stay; j < have; j++)
            std::copy_n(fresh + (fresh_count - have + j) * by, d, rows + j * d);
    }

    // The state after the first `positions` of the last pass.
    void commit(int64_t positions) {
        if (positions == 0) return;
        const int64_t d = stack.d, taps = stack.taps - 1, s = stack.window;
        float* const* state = stack.state;
        for (int64_t block = 0; block < stack.blocks; block++) {
            const float *first = kept_of(block), *second = first + MOST * by;
            if (stack.is_recurrent[block]) {
                std::copy_n(first + (positions - 1) * by, d, state[0] + row * d);
                float* inputs = state[1] + row * taps * d;
                if (doc_start) std::fill(inputs, inputs + taps * d, 0.0f);
                shift(inputs, taps, second, positions);
                state += 2;
                continue;
            }
            shift(state[0] + row * s * d, s, first, positions);
            shift(state[1] + row * s * d, s, second, positions);
            uint8_t* live = (uint8_t*)state[2] + row * s;
            if (doc_start || chunk_start) std::fill(live, live + s, 0);
            const int64_t stay = std::max<int64_t>(0, s - positions);
            std::memmove(live, live + (s - stay), stay);
            std::fill(live + stay, live + s, 1);
            state += 3;
        }
    }
};

}  // namespace

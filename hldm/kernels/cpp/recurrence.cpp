// Passes over time for hldm.kernels.scan and hldm.kernels.derivatives. All arrays are contiguous; steps are t, channels d, rows b.
// A pass takes whole rows of channels, step by step: the order in which memory is read and written fastest (measured:
// the speed of a plain copying loop, where stretches of 64 channels reach half of it).

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "threads.h"

namespace {

// How many threads `numbers` are worth, and into how many stretches of channels each of b rows must then be cut.
struct Split {
    int threads;
    int64_t stretches, width;

    Split(int64_t threads_at_most, int64_t b, int64_t t, int64_t d, int64_t unit) {
        threads = threads_for(threads_at_most, b * t * d);
        const int64_t units = d / unit;
        stretches = std::min(units, b ? (threads + b - 1) / b : 1);
        width = stretches ? (units + stretches - 1) / stretches * unit : 0;
    }
};

// work(row, first channel, channels) for every row and stretch
template <typename Work>
void over_stretches(const Split& split, int64_t rows, int64_t d, const Work& work) {
#pragma omp parallel for collapse(2) num_threads(split.threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t s = 0; s < split.stretches; s++)
            work(row, s * split.width, std::min(split.width, d - s * split.width));
}

template <typename T>
void scan(const T* a, const T* b, const T* h0, T* h, int64_t rows, int64_t t, int64_t d, int64_t threads) {
    over_stretches(Split(threads, rows, t, d, 1), rows, d, [=](int64_t row, int64_t first, int64_t width) {
        const T* before = h0 + row * d + first;
        for (int64_t step = 0; step < t; step++) {
            const int64_t at = (row * t + step) * d + first;
            const T* __restrict a_t = a + at;
            const T* __restrict b_t = b + at;
            const T* __restrict h_before = before;
            T* __restrict h_t = h + at;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) h_t[j] = a_t[j] * h_before[j] + b_t[j];
            before = h_t;
        }
    });
}

template <typename T>
void scan_back(const T* a, const T* h0, const T* h, const T* dh, const T* dh_last, T* da, T* db, T* dh0,
               int64_t rows, int64_t t, int64_t d, int64_t threads) {
    std::copy(dh_last, dh_last + rows * d, dh0);
    over_stretches(Split(threads, rows, t, d, 1), rows, d, [=](int64_t row, int64_t first, int64_t width) {
        T* __restrict flow = dh0 + row * d + first;  // dh_last on entry, a_{t+1} db_{t+1} on the way, dh0 in the end
        for (int64_t step = t - 1; step >= 0; step--) {
            const int64_t at = (row * t + step) * d + first;
            const T* __restrict a_t = a + at;
            const T* __restrict dh_t = dh + at;
            const T* __restrict h_before = step ? h + at - d : h0 + row * d + first;
            T* __restrict da_t = da + at;
            T* __restrict db_t = db + at;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                const T total = dh_t[j] + flow[j];
                db_t[j] = total;
                da_t[j] = total * h_before[j];
                flow[j] = a_t[j] * total;
            }
        }
    });
}

// ---- the RG-LRU after the products of its gates

// x (b t d), gates (h b t 2w): logits on entry, the gates themselves in the end; bias (2 d), log_radius (d),
// reset (b t) 0 or minus infinity, h0 (b d) -> h (b t d)
template <typename T>
void gated_scan(const T* x, T* gates, const T* bias, const T* log_radius, const T* reset, const T* h0, T* h,
                int64_t rows, int64_t t, int64_t heads, int64_t w, int64_t threads) {
    const int64_t d = heads * w;
    over_stretches(Split(threads, rows, t, d, w), rows, d, [=](int64_t row, int64_t begin, int64_t width) {
        for (int64_t step = 0; step < t; step++) {
            const int64_t n = row * t + step;
            const T keep = reset[n] < 0 ? T(0) : T(1);
            for (int64_t first = begin; first < begin + width; first += w) {
                const T* __restrict x_t = x + n * d + first;
                const T* __restrict before = step ? h + (n - 1) * d + first : h0 + row * d + first;
                const T* __restrict input_bias = bias + first;
                const T* __restrict decay_bias = bias + d + first;
                const T* __restrict radius = log_radius + first;
                T* __restrict input = gates + (first / w * rows * t + n) * 2 * w;
                T* __restrict decay = gates + (first / w * rows * t + n) * 2 * w + w;
                T* __restrict h_t = h + n * d + first;
#pragma omp simd
                for (int64_t j = 0; j < w; j++) {
                    const T i = sigmoid(input[j] + input_bias[j]);
                    const T r = sigmoid(decay[j] + decay_bias[j]);
                    const T e = exp_minus_one(radius[j] * r);  // a - 1: no digits are lost as a nears 1
                    const T multiplier = std::sqrt(keep * (-e * (2 + e)) + (1 - keep));
                    h_t[j] = keep * (1 + e) * before[j] + multiplier * i * x_t[j];
                    input[j] = i;
                    decay[j] = r;
                }
            }
        }
    });
}

// Backward of gated_scan. gates as it left them; dgates (h b t 2w) towards the logits; dx (b t d) without what goes
// through the gates; dbias (b 2 d) and dlog_radius (b d) by row; dh0 (b d).
// least: below it the multiplier stops bounding the gradient of its square root
template <typename T>
void gated_scan_back(const T* x, const T* gates, const T* log_radius, const T* reset, const T* h0, const T* h,
                     const T* dh, const T* dh_last, T* dx, T* dgates, T* dbias, T* dlog_radius, T* dh0, T least,
                     int64_t rows, int64_t t, int64_t heads, int64_t w, int64_t threads) {
    const int64_t d = heads * w;
    std::copy(dh_last, dh_last + rows * d, dh0);
    std::fill(dbias, dbias + rows * 2 * d, T(0));
    std::fill(dlog_radius, dlog_radius + rows * d, T(0));
    over_stretches(Split(threads, rows, t, d, w), rows, d, [=](int64_t row, int64_t begin, int64_t width) {
        for (int64_t step = t - 1; step >= 0; step--) {
            const int64_t n = row * t + step;
            const T keep = reset[n] < 0 ? T(0) : T(1);
            for (int64_t first = begin; first < begin + width; first += w) {
                const int64_t at = n * d + first, gate = (first / w * rows * t + n) * 2 * w;
                const T* __restrict x_t = x + at;
                const T* __restrict before = step ? h + at - d : h0 + row * d + first;
                const T* __restrict dh_t = dh + at;
                const T* __restrict input = gates + gate;
                const T* __restrict decay = gates + gate + w;
                const T* __restrict radius = log_radius + first;
                T* __restrict dinput = dgates + gate;
                T* __restrict ddecay = dgates + gate + w;
                T* __restrict dx_t = dx + at;
                T* __restrict flow = dh0 + row * d + first;  // as in scan_back
                T* __restrict dinput_bias = dbias + row * 2 * d + first;
                T* __restrict ddecay_bias = dbias + row * 2 * d + d + first;
                T* __restrict dradius = dlog_radius + row * d + first;
#pragma omp simd
                for (int64_t j = 0; j < w; j++) {
                    const T i = input[j], r = decay[j], e = exp_minus_one(radius[j] * r);
                    const T a = keep * (1 + e);
                    const T multiplier = std::sqrt(keep * (-e * (2 + e)) + (1 - keep));
                    const T total = dh_t[j] + flow[j];
                    const T through_input = total * multiplier, through_gate = total * x_t[j];
                    dx_t[j] = through_input * i;
                    const T di = multiplier * through_gate * (i * (1 - i));
                    // d multiplier / d log a = -a^2 / multiplier
                    const T bounded = multiplier < least ? least : multiplier;
                    const T dlog_a = a * (total * before[j] - through_gate * i * a / bounded);
                    const T dr = dlog_a * radius[j] * (r * (1 - r));
                    dradius[j] += dlog_a * r;
                    dinput[j] = di;
                    ddecay[j] = dr;
                    dinput_bias[j] += di;
                    ddecay_bias[j] += dr;
                    flow[j] = a * total;
                }
            }
        }
    });
}

// ---- the causal convolution

// y_t = bias + sum_i weight_i x_{t-(k-1-i)} inside_{t,i}; taps (b k-1 d) come before x (b t d); inside (b t k) 1 or 0
template <typename T>
void conv(const T* x, const T* taps, const T* weight, const T* bias, const T* inside, T* y, int64_t rows, int64_t t,
          int64_t d, int64_t k, int64_t threads) {
    const Split split(threads, rows, t, d, 1);
#pragma omp parallel for num_threads(split.threads)
    for (int64_t n = 0; n < rows * t; n++) {
        const int64_t row = n / t, step = n % t;
        T* __restrict y_t = y + n * d;
        std::copy(bias, bias + d, y_t);
        for (int64_t i = 0; i < k; i++) {
            if (inside[n * k + i] == 0) continue;
            const int64_t from = step + i - (k - 1);
            const T* __restrict x_i = from < 0 ? taps + (row * (k - 1) + from + k - 1) * d : x + (row * t + from) * d;
            const T* __restrict w_i = weight + i * d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) y_t[j] += w_i[j] * x_i[j];
        }
    }
}

// Backward of conv. dweight (b k d), dbias (b d) by row.
template <typename T>
void conv_back(const T* x, const T* taps, const T* weight, const T* inside, const T* dy, T* dx, T* dtaps, T* dweight,
               T* dbias, int64_t rows, int64_t t, int64_t d, int64_t k, int64_t threads) {
    const Split split(threads, rows, t, d, 1);
#pragma omp parallel for num_threads(split.threads)
    for (int64_t row = 0; row < rows; row++) {
        T* __restrict dbias_row = dbias + row * d;
        std::fill(dx + row * t * d, dx + (row + 1) * t * d, T(0));
        std::fill(dtaps + row * (k - 1) * d, dtaps + (row + 1) * (k - 1) * d, T(0));
        std::fill(dweight + row * k * d, dweight + (row + 1) * k * d, T(0));
        std::fill(dbias_row, dbias_row + d, T(0));
        for (int64_t step = 0; step < t; step++) {
            const int64_t n = row * t + step;
            const T* __restrict dy_t = dy + n * d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) dbias_row[j] += dy_t[j];
            for (int64_t i = 0; i < k; i++) {
                if (inside[n * k + i] == 0) continue;
                const int64_t from = step + i - (k - 1);
                const int64_t at = from < 0 ? (row * (k - 1) + from + k - 1) * d : (row * t + from) * d;
                const T* __restrict x_i = (from < 0 ? taps : x) + at;
                T* __restrict dx_i = (from < 0 ? dtaps : dx) + at;
                const T* __restrict w_i = weight + i * d;
                T* __restrict dw_i = dweight + (row * k + i) * d;
#pragma omp simd
                for (int64_t j = 0; j < d; j++) {
                    dx_i[j] += dy_t[j] * w_i[j];
                    dw_i[j] += dy_t[j] * x_i[j];
                }
            }
        }
    }
}

// ---- the gate of the MLP, which is the recurrent block's, too

// y = gelu(gate) x
template <typename T>
void gelu_gate(const T* __restrict gate, const T* __restrict x, T* __restrict y, int64_t numbers, int64_t threads) {
    const Split split(threads, 1, 1, numbers, 1);
#pragma omp parallel for simd num_threads(split.threads)
    for (int64_t i = 0; i < numbers; i++) y[i] = gelu(gate[i]) * x[i];
}

template <typename T>
void gelu_gate_back(const T* __restrict gate, const T* __restrict x, const T* __restrict dy, T* __restrict dgate,
                    T* __restrict dx, int64_t numbers, int64_t threads) {
    const Split split(threads, 1, 1, numbers, 1);
#pragma omp parallel for simd num_threads(split.threads)
    for (int64_t i = 0; i < numbers; i++) {
        dx[i] = dy[i] * gelu(gate[i]);
        dgate[i] = dy[i] * x[i] * gelu_slope(gate[i]);
    }
}

}  // namespace

extern "C" {
EXPORT(scan)
EXPORT(scan_back)
EXPORT(gated_scan)
EXPORT(gated_scan_back)
EXPORT(conv)
EXPORT(conv_back)
EXPORT(gelu_gate)
EXPORT(gelu_gate_back)
}

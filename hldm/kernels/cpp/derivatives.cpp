// Passes over time and over rows for hldm.kernels.derivatives. All arrays are contiguous; steps are t, channels d, rows b.
// A pass over time takes whole rows of channels, step by step: the order in which memory is read and written fastest
// (measured: the speed of a plain copying loop, where stretches of 64 channels reach half of it). What is summed over rows
// is summed by blocks that do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace {

constexpr int64_t NUMBERS_A_THREAD = 32768;  // as torch: fewer are not worth waking one
constexpr int64_t ROWS_A_BLOCK = 64;         // hldm.kernels.derivatives has it, too

inline int threads_for(int64_t at_most, int64_t numbers) {
    return int(std::max<int64_t>(1, std::min(at_most, numbers / NUMBERS_A_THREAD)));
}

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
                // dh_last on entry, a_{t+1} dh_{t+1} on the way, dh0 in the end
                T* __restrict flow = dh0 + row * d + first;
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

// ---- y = s / sqrt(mean s^2 + eps) (1 + scale) of s = x + branch, or of x where branch and sum are null

template <typename T>
void rms_norm(const T* x, const T* branch, const T* scale, T* sum, T* y, T* inverse, T eps, int64_t n, int64_t d,
              int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, n * d))
    for (int64_t i = 0; i < n; i++) {
        const T* __restrict s = x + i * d;
        T square = 0;
        if (branch) {
            const T* __restrict x_i = x + i * d;
            const T* __restrict branch_i = branch + i * d;
            T* __restrict sum_i = sum + i * d;
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < d; j++) {
                const T total = x_i[j] + branch_i[j];
                sum_i[j] = total;
                square += total * total;
            }
            s = sum_i;
        } else {
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < d; j++) square += s[j] * s[j];
        }
        const T scaled = 1 / std::sqrt(square / d + eps);
        T* __restrict y_i = y + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) y_i[j] = s[j] * scaled * (1 + scale[j]);
        inverse[i] = scaled;
    }
}

// Backward, towards s and by block of rows towards scale. dsum: what reaches s besides, or null
template <typename T>
void rms_norm_back(const T* s, const T* inverse, const T* scale, const T* dy, const T* dsum, T* ds, T* dscale,
                   int64_t n, int64_t d, int64_t threads) {
    const int64_t blocks = (n + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
#pragma omp parallel for num_threads(threads_for(threads, n * d))
    for (int64_t block = 0; block < blocks; block++) {
        T* __restrict dscale_b = dscale + block * d;
        std::fill(dscale_b, dscale_b + d, T(0));
        for (int64_t i = block * ROWS_A_BLOCK; i < std::min(n, (block + 1) * ROWS_A_BLOCK); i++) {
            const T* __restrict s_i = s + i * d;
            const T* __restrict dy_i = dy + i * d;
            T* __restrict ds_i = ds + i * d;
            const T scaled = inverse[i];
            T along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t j = 0; j < d; j++) {
                const T product = dy_i[j] * (s_i[j] * scaled);
                dscale_b[j] += product;
                along += product * (1 + scale[j]);
            }
            along /= d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) ds_i[j] = scaled * (dy_i[j] * (1 + scale[j]) - s_i[j] * scaled * along);
            if (dsum) {
                const T* __restrict dsum_i = dsum + i * d;
#pragma omp simd
                for (int64_t j = 0; j < d; j++) ds_i[j] += dsum_i[j];
            }
        }
    }
}

}  // namespace

// In both precisions, as pointers to functions: a template has no name in C.
#define EXPORT(name)                           \
    auto* hldm_##name##_float32 = name<float>; \
    auto* hldm_##name##_float64 = name<double>;

extern "C" {
EXPORT(gated_scan)
EXPORT(gated_scan_back)
EXPORT(conv)
EXPORT(conv_back)
EXPORT(gelu_gate)
EXPORT(gelu_gate_back)
EXPORT(rms_norm)
EXPORT(rms_norm_back)
}

// Passes over rows for hldm.kernels.derivatives: norm, softmax, readout, rows by their number. All arrays are contiguous; index
// arrays hold int64. What is summed over rows is summed by blocks that do not depend on the number of threads.

#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "threads.h"

namespace {

constexpr int64_t ROWS_A_BLOCK = 64;  // hldm.kernels.operators has it, too

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

// ---- nats = log sum exp(x) - x_target; a target that does not exist costs NaN

template <typename T>
void softmax_nats(const T* x, const int64_t* target, T* nats, T* log_sum, int64_t n, int64_t v, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, n * v))
    for (int64_t i = 0; i < n; i++) {
        const T* __restrict x_i = x + i * v;
        T most = x_i[0], sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < v; j++) most = most < x_i[j] ? x_i[j] : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < v; j++) sum += exponential(x_i[j] - most);
        log_sum[i] = most + std::log(sum);
        nats[i] = target[i] >= 0 && target[i] < v ? log_sum[i] - x_i[target[i]] : T(NAN);
    }
}

template <typename T>
void softmax_nats_back(const T* x, const int64_t* target, const T* log_sum, const T* dnats, T* dx, int64_t n,
                       int64_t v, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, n * v))
    for (int64_t i = 0; i < n; i++) {
        const T* __restrict x_i = x + i * v;
        T* __restrict dx_i = dx + i * v;
        const T all = log_sum[i], dnats_i = dnats[i];
#pragma omp simd
        for (int64_t j = 0; j < v; j++) dx_i[j] = dnats_i * exponential(x_i[j] - all);
        if (target[i] >= 0 && target[i] < v) dx_i[target[i]] -= dnats_i;
    }
}

// ---- y = gelu(x_index + p_place), gelu in its exact form; x (b n d), index and place (b t), p (k d) -> y (b t d)

template <typename T>
void placed_gelu(const T* x, const int64_t* index, const T* p, const int64_t* place, T* y, int64_t rows, int64_t n,
                 int64_t t, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, rows * t * d))
    for (int64_t i = 0; i < rows * t; i++) {
        const T* __restrict x_i = x + (i / t * n + index[i]) * d;
        const T* __restrict p_i = p + place[i] * d;
        T* __restrict y_i = y + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) {
            const T sum = x_i[j] + p_i[j];
            y_i[j] = sum * normal_at(sum).below;
        }
    }
}

// Backward; dp (b k d) by row of documents
template <typename T>
void placed_gelu_back(const T* x, const int64_t* index, const T* p, const int64_t* place, const T* dy, T* dx, T* dp,
                      int64_t rows, int64_t n, int64_t t, int64_t d, int64_t k, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, rows * t * d))
    for (int64_t row = 0; row < rows; row++) {
        std::fill(dx + row * n * d, dx + (row + 1) * n * d, T(0));
        std::fill(dp + row * k * d, dp + (row + 1) * k * d, T(0));
        for (int64_t i = row * t; i < (row + 1) * t; i++) {
            const T* __restrict x_i = x + (row * n + index[i]) * d;
            const T* __restrict p_i = p + place[i] * d;
            const T* __restrict dy_i = dy + i * d;
            T* __restrict dx_i = dx + (row * n + index[i]) * d;
            T* __restrict dp_i = dp + (row * k + place[i]) * d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) {
                const T sum = x_i[j] + p_i[j];
                const auto normal = normal_at(sum);
                const T flow = dy_i[j] * T(normal.below + sum * normal.density);
                dx_i[j] += flow;
                dp_i[j] += flow;
            }
        }
    }
}

// ---- rows by their number, and back: x (b n d), index (b t), below 0 where there is none, y (b t d)

template <typename T>
void take_rows(const T* x, const int64_t* index, T* y, int64_t rows, int64_t n, int64_t t, int64_t d,
               int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, rows * t * d))
    for (int64_t i = 0; i < rows * t; i++) {
        if (index[i] < 0)
            std::fill(y + i * d, y + (i + 1) * d, T(0));
        else
            std::copy(x + (i / t * n + index[i]) * d, x + (i / t * n + index[i] + 1) * d, y + i * d);
    }
}

template <typename T>
void add_rows(const T* y, const int64_t* index, T* x, int64_t rows, int64_t n, int64_t t, int64_t d,
              int64_t threads) {
#pragma omp parallel for num_threads(threads_for(threads, rows * t * d))
    for (int64_t row = 0; row < rows; row++) {
        std::fill(x + row * n * d, x + (row + 1) * n * d, T(0));
        for (int64_t i = row * t; i < (row + 1) * t; i++) {
            if (index[i] < 0) continue;
            T* __restrict x_i = x + (row * n + index[i]) * d;
            const T* __restrict y_i = y + i * d;
#pragma omp simd
            for (int64_t j = 0; j < d; j++) x_i[j] += y_i[j];
        }
    }
}

}  // namespace

extern "C" {
EXPORT(rms_norm)
EXPORT(rms_norm_back)
EXPORT(softmax_nats)
EXPORT(softmax_nats_back)
EXPORT(placed_gelu)
EXPORT(placed_gelu_back)
EXPORT(take_rows)
EXPORT(add_rows)
}

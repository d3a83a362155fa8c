// Elementwise functions that a compiler turns into vector code, in float and, exactly, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float from_bits(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline int32_t to_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// exp(x) = scale (1 + q), with q to a relative error of about 1e-7, near x = 0, too; NaN stays NaN.
// x = k ln 2 + r: scale = 2^k, q = exp(r) - 1 by Taylor, |r| <= ln(2) / 2. x is held within [-60, 60]: what is beyond
// makes no difference to any use here, and denormal numbers would make all of this ten times slower.
struct Exponential {
    float scale, q;

    explicit Exponential(float x) {
        x = x < -60.0f ? -60.0f : x;
        x = x > 60.0f ? 60.0f : x;
        const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
        const float shifted = x * 1.44269504f + magic;
        const float k = shifted - magic;
        const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
        float sum = 1.0f / 5040;
        sum = sum * r + 1.0f / 720;
        sum = sum * r + 1.0f / 120;
        sum = sum * r + 1.0f / 24;
        sum = sum * r + 1.0f / 6;
        sum = sum * r + 0.5f;
        q = sum * r * r + r;
        scale = from_bits((to_bits(shifted) - to_bits(magic) + 127) << 23);
    }
};

inline float exponential(float x) {
    const Exponential e(x);
    return e.scale * e.q + e.scale;
}
inline double exponential(double x) { return std::exp(x); }

inline float exp_minus_one(float x) {
    const Exponential e(x);
    return e.scale * e.q + (e.scale - 1.0f);
}
inline double exp_minus_one(double x) { return std::expm1(x); }

template <typename T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}

// The tanh approximation of gelu: x (1 + tanh(u)) / 2 = x sigmoid(2 u), and its derivative.
template <typename T>
inline T gelu(T x) {
    const T twice_root = T(1.5957691216057308);  // 2 sqrt(2 / pi)
    return x * sigmoid(twice_root * (x + T(0.044715) * x * x * x));
}

// x (1 + erf(x / sqrt(2))) / 2, gelu itself. 1 - erf(y), y >= 0, to 1.5e-7: Abramowitz and Stegun, 7.1.26.
inline float exact_gelu(float x) {
    const float y = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * y);
    float sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const float half = 0.5f * x * sum * t * exponential(-y * y);
    return x < 0 ? half : x - half;
}

template <typename T>
inline T gelu_slope(T x) {
    const T twice_root = T(1.5957691216057308);
    const T s = sigmoid(twice_root * (x + T(0.044715) * x * x * x));
    return s + x * s * (1 - s) * twice_root * (1 + 3 * T(0.044715) * x * x);
}

// The normal distribution at x: how much of it lies below, and its density. In float to 1e-7, absolute: erfc is
// Abramowitz and Stegun's 7.1.26, as in torch.
struct Normal {
    float below, density;

    explicit Normal(float x) {
        const float e = exponential(-0.5f * x * x);
        const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
        float sum = 1.061405429f;
        sum = sum * t - 1.453152027f;
        sum = sum * t + 1.421413741f;
        sum = sum * t - 0.284496736f;
        sum = sum * t + 0.254829592f;
        const float tail = 0.5f * sum * t * e;
        below = x > 0 ? 1.0f - tail : tail;
        density = 0.39894228f * e;
    }
};

struct ExactNormal {
    double below, density;

    explicit ExactNormal(double x)
        : below(0.5 * std::erfc(-0.70710678118654752 * x)), density(0.39894228040143268 * std::exp(-0.5 * x * x)) {}
};

inline Normal normal_at(float x) { return Normal(x); }
inline ExactNormal normal_at(double x) { return ExactNormal(x); }

// log(1 + exp(x)) to a relative error of about 1e-6. With 1 + exp(x) = 2^k m: k ln 2 + 2 atanh((m - 1) / (m + 1)).
inline float softplus(float x) {
    const float y = exponential(x);
    const float one_more = 1.0f + y;
    const int32_t k = (to_bits(one_more) - to_bits(0.70710678f)) >> 23;  // m lies within [sqrt(1/2), sqrt(2))
    const float m = from_bits(to_bits(one_more) - (k << 23));
    const float f = k == 0 ? y : m - 1.0f;  // y itself: 1 + y has lost its digits where y is small
    const float s = f / (2.0f + f), s2 = s * s;
    const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
    const float small = k * 0.693147181f + 2.0f * s * series;
    return x > 20.0f ? x : small;  // as torch
}

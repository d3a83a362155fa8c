// How many threads a pass is worth, and how hldm.kernels.operators finds it.
#pragma once

#include <algorithm>
#include <cstdint>

constexpr int64_t NUMBERS_A_THREAD = 32768;  // as torch: fewer are not worth waking one

inline int threads_for(int64_t at_most, int64_t numbers) {
    return int(std::max<int64_t>(1, std::min(at_most, numbers / NUMBERS_A_THREAD)));
}

// A pass in both precisions, as pointers to functions: a template has no name in C.
#define EXPORT(name)                        \
    auto* hldm_##name##_float32 = name<float>; \
    auto* hldm_##name##_float64 = name<double>;

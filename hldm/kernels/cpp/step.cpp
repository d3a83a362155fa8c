// One position through a whole Griffin stack, for hldm.kernels.stack.

#include <numeric>

#include "stack.h"

extern "C" void hldm_griffin_step(const Shape* shape, const uint8_t* is_recurrent, const float* const* weights,
                                  const float* rotation, const float* x, const uint8_t* doc_start,
                                  const uint8_t* chunk_start, const float* const* state, float* const* after,
                                  float* y) {
    std::vector<int64_t> index(shape->batch);
    std::iota(index.begin(), index.end(), 0);
    over_threads(shape->batch, shape->threads, [&](int64_t begin, int64_t rows) {
        in_groups(rows, [&](auto lanes, int64_t first, int64_t count) {
            Group<decltype(lanes)::value> group(*shape, &index[begin + first], count, doc_start, chunk_start);
            group.spread(x, shape->d, group.x);
            group.run(is_recurrent, weights, rotation, state, after);
            group.collect(group.normed, shape->d, y);
        });
    });
}

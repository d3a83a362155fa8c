// One chunk more of context a row, for hldm.kernels.context: its latent and the summaries that it completes go through the
// contextualiser's layers, what can never be seen again gives up its place, and the denoiser's conditioning is what is seen now.
// Every entry is kept as its keys and values, in a place of its own; place 0 is the document's start.

#include "stack.h"

namespace {

// P places, f features, k components, D the denoiser's width.
struct Contexting {
    int64_t rows, z, d, heads, features, levels, ratio, window, places;
    int64_t layers, blocks, denoiser_width, components, threads;
    double logit_cap;             // of the weights' logits; 0 for none
    const float* const* ends;     // embed, its bias, levels (levels+1 d), norm, its bias, embed_feature or none
    const float* const* layer;    // of each: norm, query, key_value, out, norm, both of the MLP, each with bias; bias table
    const float* const* block;    // of each of the denoiser's: key_value, its bias, from_context, its bias, bias table
    const float* const* mixture;  // norm, both layers, each with its bias; none without components
    const float* opening;         // (d) output at the document's start
    int64_t *level, *end, *written;     // (b P), (b P) -1 where nothing is, (b)
    float *partial, *latest, *feature;  // (b levels z), (b d), (b f)
    float* const* pairs;                // of each layer, then block: keys, values (b h P e)
    float* log_weights;                 // (b k)
    float* const* conditioning;         // of each block: shared (b 4D), gates (b 2D), bias (b h P)
    const float *latents, *after;       // (b z), (b f) of the chunk just written
    const uint8_t* closed;              // (b) whether it closed its document: the next one begins with nothing
};

struct Entry {
    int64_t row, place, level;
};

struct Sight {
    int64_t place, index;  // index: in the tables of biases, by level and distance
};

// hldm.model.contextualiser.Contextualiser for rows of a batch, and hldm.model.prior.Prior.tell.
struct Pyramid {
    const Contexting& w;
    int64_t first, rows;
    std::vector<int64_t> size, lower;      // r^l; s_l of hldm.model.hierarchy
    std::vector<Entry> born;               // in this chunk
    std::vector<float> x;                  // (born d)
    std::vector<std::vector<Sight>> seen;  // of each row

    Pyramid(const Contexting& w, int64_t first, int64_t rows)
        : w(w), first(first), rows(rows), size(w.levels + 1, 1), lower(w.levels + 1), seen(rows) {
        for (int64_t l = 1; l <= w.levels; l++) size[l] = size[l - 1] * w.ratio;
    }

    // hldm.model.hierarchy.level_starts
    void find_starts(int64_t written) {
        int64_t upper = written;
        for (int64_t l = 0; l <= w.levels; l++) {
            const int64_t align = l < w.levels ? size[l] * w.ratio : size[l];
            upper = lower[l] = std::max<int64_t>(upper - w.window * size[l], 0) / align * align;
        }
    }

    int64_t bias_index(int64_t level, int64_t away) const {
        return level * w.places + std::min(away / size[level], w.places - 1);
    }

    // A new entry: the embedding of a latent or of a mean, in the first place that is free.
    void give_birth(int64_t row, int64_t level, const float* latent, float scale) {
        int64_t *ends = w.end + row * w.places, place = 1;
        while (place < w.places - 1 && ends[place] >= 0) place++;
        ends[place] = w.written[row];
        w.level[row * w.places + place] = level;
        born.push_back({row, place, level});
        std::vector<float> embedded(w.d), given(w.d), input(w.z);
        for (int64_t j = 0; j < w.z; j++) input[j] = latent[j] * scale;
        multiply<1>(w.ends[0], input.data(), embedded.data(), w.d, w.z);
        if (level == 0 && w.ends[5]) multiply<1>(w.ends[5], w.feature + row * w.features, given.data(), w.d, w.features);
        for (int64_t i = 0; i < w.d; i++)
            x.push_back(embedded[i] + w.ends[1][i] + w.ends[2][level * w.d + i] + given[i]);
    }

    // Count the chunk, forget what is out of reach, make room for what is new.
    void walk(int64_t row) {
        int64_t *level = w.level + row * w.places, *end = w.end + row * w.places, &t = w.written[row];
        float *partial = w.partial + row * w.levels * w.z, *feature = w.feature + row * w.features;
        if (w.closed[row]) {
            t = 0;
            std::fill(end + 1, end + w.places, -1);
            std::fill(partial, partial + w.levels * w.z, 0.0f);
            std::fill(feature, feature + w.features, 0.0f);
            std::copy_n(w.opening, w.d, w.latest + row * w.d);
        } else {
            t++;
            std::copy_n(w.after + row * w.features, w.features, feature);
        }
        find_starts(t);
        for (int64_t place = 1; place < w.places; place++)
            if (end[place] >= 0 && end[place] - size[level[place]] < lower[level[place]]) end[place] = -1;
        if (!w.closed[row]) {
            const float* latent = w.latents + row * w.z;
            give_birth(row, 0, latent, 1.0f);
            for (int64_t l = 1; l <= w.levels; l++) {
                float* sum = partial + (l - 1) * w.z;
                for (int64_t j = 0; j < w.z; j++) sum[j] += latent[j];
                if (t % size[l] != 0) continue;
                give_birth(row, l, sum, 1.0f / size[l]);
                std::fill(sum, sum + w.z, 0.0f);
            }
        }
        auto& sees = seen[row - first];
        sees.push_back({0, bias_index(0, t)});
        for (int64_t place = 1; place < w.places; place++) {  // hldm.model.hierarchy.visible
            const int64_t l = level[place], upper = l ? lower[l - 1] : t;
            if (end[place] >= 0 && end[place] - size[l] >= lower[l] && end[place] <= upper)
                sees.push_back({place, bias_index(l, t - end[place])});
        }
    }

    // Attention of one entry to what its row sees, and itself; over the query (d, L) in a lane
    template <int L>
    void attend(const Entry& entry, const float* key, const float* value, const float* table, float* query) {
        std::vector<Sight>& sees = seen[entry.row - first];
        if (entry.level) sees.push_back({entry.place, bias_index(entry.level, 0)});  // which no one else sees yet
        std::vector<Seen> there(sees.size());
        for (int64_t head = 0; head < w.heads; head++) {
            const int64_t e = w.d / w.heads, at = (entry.row * w.heads + head) * w.places * e;
            for (size_t j = 0; j < sees.size(); j++)
                there[j] = {sees[j].place, table[sees[j].index * w.heads + head]};
            attend_to<L>(there, key + at, value + at, e, query + head * e * L);
        }
        if (entry.level) sees.pop_back();
    }

    // Keys and values of some new entries, from (d, L), to their places.
    template <int L>
    void keep(int64_t from, int64_t count, const float* const* key_value, const float* input, float* const* pair) {
        const int64_t e = w.d / w.heads;
        std::vector<float> both(2 * w.d * L);
        linear<L>(key_value, input, both.data(), 2 * w.d, w.d);
        for (int64_t lane = 0; lane < count; lane++) {
            const Entry& entry = born[from + lane];
            for (int64_t half = 0; half < 2; half++)
                for (int64_t head = 0; head < w.heads; head++) {
                    float* to = pair[half] + ((entry.row * w.heads + head) * w.places + entry.place) * e;
                    for (int64_t i = 0; i < e; i++) to[i] = both[(half * w.d + head * e + i) * L + lane];
                }
        }
    }

    // Everyone born may look at everyone born: first all keys and values of a layer, then all queries.
    void run_layer(const float* const* p, float* const* pair) {
        const int64_t d = w.d;
        in_groups(born.size(), [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            std::vector<float> own(2 * d * L);
            float* normed = own.data() + d * L;
            into_lanes<L>(&x[from * d], count, d, own.data());
            layer_norm<L>(p, own.data(), normed, d);
            keep<L>(from, count, p + 4, normed, pair);
        });
        in_groups(born.size(), [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            std::vector<float> own(7 * d * L);
            float *normed = own.data() + d * L, *query = normed + d * L, *wide = query + d * L;
            into_lanes<L>(&x[from * d], count, d, own.data());
            layer_norm<L>(p, own.data(), normed, d);
            linear<L>(p + 2, normed, query, d, d);
            for (int64_t lane = 0; lane < count; lane++)
                attend<L>(born[from + lane], pair[0], pair[1], p[14], query + lane);
            linear<L>(p + 6, query, normed, d, d);
            for (int64_t i = 0; i < d * L; i++) own[i] += normed[i];
            layer_norm<L>(p + 8, own.data(), normed, d);
            linear<L>(p + 10, normed, wide, 4 * d, d);
            gelu_all(wide, 4 * d * L);
            linear<L>(p + 12, wide, normed, d, 4 * d);
            for (int64_t i = 0; i < d * L; i++) own[i] += normed[i];
            from_lanes<L>(own.data(), count, d, &x[from * d]);
        });
    }

    // The last norm, the denoiser's keys and values, and the output at the newest chunk.
    void finish() {
        in_groups(born.size(), [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            std::vector<float> own(2 * w.d * L);
            float* output = own.data() + w.d * L;
            into_lanes<L>(&x[from * w.d], count, w.d, own.data());
            layer_norm<L>(w.ends + 3, own.data(), output, w.d);
            for (int64_t block = 0; block < w.blocks; block++)
                keep<L>(from, count, w.block + 5 * block, output, w.pairs + 2 * (w.layers + block));
            for (int64_t lane = 0; lane < count; lane++) {
                const Entry& entry = born[from + lane];
                for (int64_t i = 0; i < w.d && entry.level == 0; i++)
                    w.latest[entry.row * w.d + i] = output[i * L + lane];
            }
        });
    }

    // log w_k(h): hldm.model.mixture.MixturePredictor.log_weights
    template <int L>
    void weigh(int64_t from, int64_t count) {
        const int64_t f = w.features, k = w.components;
        std::vector<float> own((4 * f + k) * L);
        float *normed = own.data() + f * L, *wide = normed + f * L, *logits = wide + 2 * f * L;
        into_lanes<L>(w.feature + from * f, count, f, own.data());
        layer_norm<L>(w.mixture, own.data(), normed, f);
        linear<L>(w.mixture + 2, normed, wide, 2 * f, f);
        gelu_all(wide, 2 * f * L);
        linear<L>(w.mixture + 4, wide, logits, k, 2 * f);
        const float cap = w.logit_cap;  // c tanh(l / c); tanh(x) = 2 sigmoid(2 x) - 1
        for (int64_t i = 0; cap > 0 && i < k * L; i++) logits[i] = cap * (2 * sigmoid(2 / cap * logits[i]) - 1);
        for (int64_t lane = 0; lane < count; lane++) {
            float largest = -INFINITY, total = 0;
            for (int64_t i = 0; i < k; i++) largest = std::max(largest, logits[i * L + lane]);
            for (int64_t i = 0; i < k; i++) total += exponential(logits[i * L + lane] - largest);
            const float norm = largest + std::log(total);
            for (int64_t i = 0; i < k; i++) w.log_weights[(from + lane) * k + i] = logits[i * L + lane] - norm;
        }
    }

    // hldm.model.denoiser.DenoiserBlock.read, but for keys and values
    template <int L>
    void tell(int64_t from, int64_t count) {
        const int64_t D = w.denoiser_width;
        std::vector<float> own((w.d + 6 * D) * L);
        float* both = own.data() + w.d * L;
        into_lanes<L>(w.latest + from * w.d, count, w.d, own.data());
        for (int64_t block = 0; block < w.blocks; block++) {
            const float* const* p = w.block + 5 * block;
            float* const* conditioning = w.conditioning + 3 * block;
            float *shared = conditioning[0], *gates = conditioning[1], *bias = conditioning[2];
            linear<L>(p + 2, own.data(), both, 6 * D, w.d);
            from_lanes<L>(both, count, 4 * D, shared + from * 4 * D);
            from_lanes<L>(both + 4 * D * L, count, 2 * D, gates + from * 2 * D);
            for (int64_t row = from; row < from + count; row++)
                for (int64_t head = 0; head < w.heads; head++) {
                    float* own_bias = bias + (row * w.heads + head) * w.places;
                    std::fill(own_bias, own_bias + w.places, -INFINITY);
                    for (const Sight& sight : seen[row - first])
                        own_bias[sight.place] = p[4][sight.index * w.heads + head];
                }
        }
    }

    void run() {
        for (int64_t row = first; row < first + rows; row++) walk(row);
        for (int64_t layer = 0; layer < w.layers; layer++) run_layer(w.layer + 15 * layer, w.pairs + 2 * layer);
        finish();
        in_groups(rows, [&](auto lanes, int64_t from, int64_t count) {
            constexpr int L = decltype(lanes)::value;
            if (w.components) weigh<L>(first + from, count);
            tell<L>(first + from, count);
        });
    }
};

}  // namespace

extern "C" void hldm_context(const Contexting* contexting) {
    over_threads(contexting->rows, contexting->threads,
                 [&](int64_t begin, int64_t rows) { Pyramid(*contexting, begin, rows).run(); });
}

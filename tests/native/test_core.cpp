// The C++ core without Python, to be run under sanitizers (`make sanitize`): odd sizes, trees, batches, several
// threads, a pool that changes its size, callers at once. A row's bits must not depend on any of it.
#include "core.h"
#include "simd.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            std::exit(1);                                                            \
        }                                                                            \
    } while (0)

namespace {

using Floats = std::vector<float>;
using Parents = std::vector<int64_t>;

size_t up(int size, int unit) { return static_cast<size_t>((size + unit - 1) / unit * unit); }

Floats noise(size_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    Floats x(count);
    for (auto& value : x) value = normal(generator);
    return x;
}

// Random packed weights: what padding holds is zero, as the contract says.
struct Weights {
    Linear c{};
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    std::vector<int8_t> bytes;
    std::vector<float> scale, bias;
    std::vector<int32_t> sums;

    Weights(int kind, int inputs, int outputs, unsigned seed, bool biased) {
        const int unit = kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 32 : 64, together = 1 << kind;
        size_t padded = up(inputs, unit), rows = up(outputs, 16);
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        if (kind == FLOAT32) floats.resize(rows * padded);
        if (kind == BFLOAT16) halves.resize(rows * padded);
        if (kind == INT8) bytes.resize(rows * padded), scale.assign(rows, 0.01f), sums.resize(rows);
        if (biased) bias.resize(rows);
        for (size_t o = 0; o < static_cast<size_t>(outputs); o++) {
            for (size_t i = 0; i < static_cast<size_t>(inputs); i++) {
                size_t p = static_cast<size_t>(together);
                size_t at = ((o / 16 * (padded / p) + i / p) * 16 + o % 16) * p + i % p;
                float value = normal(generator) * 0.3f;
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                if (kind == FLOAT32) floats[at] = value;
                if (kind == BFLOAT16) halves[at] = static_cast<uint16_t>(bits >> 16);
                if (kind == INT8) sums[o] += bytes[at] = static_cast<int8_t>(value * 60 > 127 ? 127 : value * 60 < -127 ? -127 : value * 60);
            }
            if (biased) bias[o] = normal(generator);
        }
        const void* weight = kind == FLOAT32 ? static_cast<const void*>(floats.data())
                             : kind == BFLOAT16 ? static_cast<const void*>(halves.data())
                                                : static_cast<const void*>(bytes.data());
        c = {kind, inputs, static_cast<int32_t>(padded), outputs, weight, kind == INT8 ? scale.data() : nullptr,
             kind == INT8 ? sums.data() : nullptr, biased ? bias.data() : nullptr};
    }
    Weights(Weights&&) = default;
};

struct Shape {
    int hidden, intermediate, heads, kv_heads, head_dim;
    bool head_norms, biases;
};

struct Model {
    static constexpr int LAYERS = 2, SLOTS = 4, ROWS = 96;
    Shape shape;
    std::vector<Weights> weights;
    Floats norm, head_norm, frequencies;
    std::vector<Layer> layers;
    Stack stack{};
    Cache cache{};
    std::vector<float> keys, values;  // twice the room where the cells are halves
    std::vector<int32_t> lengths = std::vector<int32_t>(SLOTS, 0);

    Model(int kind, const Shape& shape_, unsigned seed) : shape(shape_) {
        norm = noise(static_cast<size_t>(shape.hidden), seed + 1);
        head_norm = noise(static_cast<size_t>(shape.head_dim), seed + 2);
        for (int i = 0; i < shape.head_dim / 2; i++) frequencies.push_back(1.0f / static_cast<float>(1 + i));
        int wide = shape.heads * shape.head_dim, qkv = wide + 2 * shape.kv_heads * shape.head_dim;
        int pair = 2 * static_cast<int>(up(shape.intermediate, 16));
        for (int l = 0; l < LAYERS; l++) {
            unsigned s = seed + 10 * static_cast<unsigned>(l);
            weights.emplace_back(kind, shape.hidden, qkv, s + 3, shape.biases);
            weights.emplace_back(kind, wide, shape.hidden, s + 4, shape.biases);
            weights.emplace_back(kind, shape.hidden, pair, s + 5, shape.biases);
            weights.emplace_back(kind, shape.intermediate, shape.hidden, s + 6, shape.biases);
        }
        const float* heads = shape.head_norms ? head_norm.data() : nullptr;
        for (size_t l = 0; l < LAYERS; l++)
            layers.push_back({norm.data(), heads, heads, norm.data(), weights[4 * l].c, weights[4 * l + 1].c,
                              weights[4 * l + 2].c, weights[4 * l + 3].c});
        stack = {shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, LAYERS, 1e-5f, 1.0f,
                 frequencies.data(), norm.data(), nullptr, {}, layers.data()};
        size_t cells = static_cast<size_t>(LAYERS * SLOTS * shape.kv_heads) * ROWS / (kind == FLOAT32 ? 1 : 2);
        keys.resize(cells * up(shape.head_dim, 32));
        values.resize(cells * up(shape.head_dim, 16));
        cache = {keys.data(), values.data(), SLOTS, ROWS, kind != FLOAT32};
    }

    Floats run(const Floats& x, int batch, int first_slot, const Parents& parents, int pending = 0, const uint8_t* adapted = nullptr,
               const std::vector<int32_t>& taps = {}) const {
        Floats out(x.size() * (1 + taps.size()));
        int count = static_cast<int>(x.size()) / shape.hidden / batch;
        CHECK(parents.size() == static_cast<size_t>(batch * (pending + count)));
        CHECK(s4c_pass(&stack, &cache, x.data(), out.data(), batch, count, pending, first_slot, &lengths[static_cast<size_t>(first_slot)], parents.data(), adapted,
                       taps.data(), static_cast<int>(taps.size())) == 0);
        return out;
    }

    void keep(int slot, const std::vector<int32_t>& rows) {
        auto& length = lengths[static_cast<size_t>(slot)];
        s4c_keep(&cache, LAYERS, shape.kv_heads, shape.head_dim, slot, length, rows.data(), static_cast<int>(rows.size()));
        length += static_cast<int32_t>(rows.size());
    }

    Floats row(const Floats& x, size_t at) const {
        size_t d = static_cast<size_t>(shape.hidden);
        return Floats(x.begin() + static_cast<long>(at * d), x.begin() + static_cast<long>((at + 1) * d));
    }

    // A pass for each row, behind what the slot holds.
    std::vector<Floats> steps(int slot, const std::vector<Floats>& rows) {
        std::vector<Floats> out;
        for (const auto& x : rows) {
            out.push_back(run(x, 1, slot, {-1}));
            keep(slot, {0});
        }
        return out;
    }
};

bool same(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

Parents random_tree(int nodes, std::mt19937& generator) {
    Parents parents{-1};
    for (int i = 1; i < nodes; i++) parents.push_back(static_cast<int64_t>(generator() % static_cast<unsigned>(i)));
    return parents;
}

// Two rounds of a tree in each of two slots, against plain steps of one thread in a third.
void speculative_is_plain(int kind, const Shape& shape, int prompt, int nodes, unsigned seed) {
    Model model(kind, shape, seed);
    std::mt19937 generator(seed);
    const size_t d = static_cast<size_t>(shape.hidden);
    std::vector<Floats> texts[2];
    for (int slot = 0; slot < 2; slot++) {
        int count = prompt + 5 * slot;
        Floats x = noise(static_cast<size_t>(count) * d, seed + 20 + static_cast<unsigned>(slot));
        Parents chain;
        std::vector<int32_t> all;
        for (int i = 0; i < count; i++) chain.push_back(i - 1), all.push_back(i), texts[slot].push_back(model.row(x, static_cast<size_t>(i)));
        if (count) model.run(x, 1, slot, chain), model.keep(slot, all);
    }
    for (int turn = 0; turn < 2; turn++) {
        Parents parents[2] = {random_tree(nodes, generator), random_tree(nodes, generator)};
        Parents both = parents[0];
        both.insert(both.end(), parents[1].begin(), parents[1].end());
        Floats x = noise(2 * static_cast<size_t>(nodes) * d, seed + 30 + static_cast<unsigned>(turn));
        Floats features = model.run(x, 2, 0, both);
        for (int slot = 0; slot < 2; slot++) {
            std::vector<int32_t> path;
            for (int64_t at = nodes - 1; at >= 0; at = parents[slot][static_cast<size_t>(at)]) path.insert(path.begin(), static_cast<int32_t>(at));
            for (int32_t node : path) texts[slot].push_back(model.row(x, static_cast<size_t>(slot * nodes + node)));
            const int threads = s4c_threads();
            s4c_set_threads(1);
            model.lengths[2] = 0;
            auto expected = model.steps(2, texts[slot]);
            s4c_set_threads(threads);
            for (size_t i = 0; i < path.size(); i++) {
                size_t node = static_cast<size_t>(slot * nodes + path[i]);
                CHECK(same(model.row(features, node), expected[expected.size() - path.size() + i]));
            }
            model.keep(slot, path);
        }
    }
    // Levels in passes of their own, behind one another uncommitted.
    Floats first = noise(2 * d, seed + 40), second = noise(d, seed + 41), whole = first;
    whole.insert(whole.end(), second.begin(), second.end());
    Floats expected = model.run(whole, 1, 1, {-1, 0, 1});
    model.run(first, 1, 1, {-1, 0});
    CHECK(same(model.run(second, 1, 1, {-1, 0, 1}, 2), model.row(expected, 2)));
}

void rows_know_no_other(int kind, int inputs, int outputs, unsigned seed) {
    Weights weights(kind, inputs, outputs, seed, seed % 2);
    const size_t in = static_cast<size_t>(inputs), out = static_cast<size_t>(outputs);
    for (int count : {1, 2, 3, 7, 16, 17, 50}) {
        Floats x = noise(static_cast<size_t>(count) * in, seed), y(static_cast<size_t>(count) * out), alone(out);
        CHECK(s4c_linear(&weights.c, x.data(), count, y.data()) == 0);
        for (size_t r = 0; r < static_cast<size_t>(count); r++) {
            CHECK(s4c_linear(&weights.c, x.data() + r * in, 1, alone.data()) == 0);
            CHECK(std::memcmp(alone.data(), y.data() + r * out, out * sizeof(float)) == 0);
        }
    }
}

// The trees of two sequences drafted together are those of each alone.
void drafts_know_no_other_sequence(int kind, bool best, int expanded, unsigned seed) {
    const Shape shape{24, 32, 4, 2, 6, false, false};
    constexpr int HEADS = 2, VOCABULARY = 50, LONGEST = 4, DEPTH = 4;
    const size_t d = 24;
    const Plan plan{best, 3, DEPTH, best ? 9 : 3 * DEPTH + 1, expanded, -1e30f};
    const int counts[2] = {2, LONGEST};
    std::vector<int64_t> ids(VOCABULARY), tokens{7, 3, 0, 0, 1, 2, 3, 4};
    for (int i = 0; i < VOCABULARY; i++) ids[static_cast<size_t>(i)] = i;
    Floats embedding = noise(VOCABULARY * d, seed), features = noise(2 * LONGEST * d, seed + 1), gumbel = noise(VOCABULARY, seed + 2);
    const float temperatures[2] = {0.0f, 0.8f};
    Weights lm_head(kind, 24, VOCABULARY, seed + 3, false), joins[2] = {{kind, 48, 24, seed + 4, false}, {kind, 48, 24, seed + 5, true}};
    Weights more(FLOAT32, 24, 5, seed + 6, false);
    const int64_t more_ids[5] = {9, 8, 7, 6, 5};
    auto draft = [&](int first, int batch) {
        Model models[2] = {{kind, shape, seed + 100}, {kind, shape, seed + 200}};
        const Stack* stacks[2];
        const Cache* caches[2];
        for (int h = 0; h < HEADS; h++) {
            models[h].stack.join_norm = models[h].norm.data(), models[h].stack.join = joins[h].c;
            stacks[h] = &models[h].stack, caches[h] = &models[h].cache;
        }
        const Linear* products[1] = {&lm_head.c};
        Heads heads{HEADS, 1, stacks, caches, products, ids.data(), {embedding.data(), 0}};
        Floats carry(static_cast<size_t>(batch) * d);
        std::vector<const float*> read;
        std::vector<float*> carried;
        for (int b = 0; b < batch; b++) {
            read.push_back(features.data() + static_cast<size_t>((first + b) * LONGEST) * d);
            carried.push_back(carry.data() + static_cast<size_t>(b) * d);
        }
        std::vector<const float*> rows;
        for (int b = first; b < first + batch; b++) rows.insert(rows.end(), DEPTH, b ? gumbel.data() : nullptr);
        const int32_t lengths[2] = {0, 0};
        const Linear* further[2] = {nullptr, &more.c};
        const int64_t* further_ids[2] = {nullptr, more_ids};
        const int64_t one[] = {5, 7, 3, 7, 3}, other[] = {1, 2, 3, 4, 9, 1, 2, 3, 49, 3, 4};
        const int64_t* texts[2] = {one, other};
        const int32_t text_lengths[2] = {5, 11};
        const float echo[2] = {0.2f, 3.0f};
        Round round{batch, LONGEST, tokens.data() + first * LONGEST, counts + first, lengths, read.data(),
                    carried.data(), temperatures + first, rows.data(), further + first, further_ids + first,
                    texts + first, text_lengths + first, echo, 2, 6, 2};
        std::vector<int64_t> out(static_cast<size_t>(2 * batch * plan.nodes));
        Floats path(static_cast<size_t>(batch * plan.nodes));
        std::vector<uint8_t> candidate(path.size());
        CHECK(s4c_draft(&heads, &plan, &round, plan.nodes, out.data(), out.data() + batch * plan.nodes, path.data(), candidate.data()) == plan.nodes);
        for (size_t i = 0; i < path.size(); i++) CHECK(candidate[i] == (i % static_cast<size_t>(plan.nodes) && std::isfinite(path[i])));
        return out;
    };
    auto both = draft(0, 2);
    for (int b = 0; b < 2; b++) {
        auto alone = draft(b, 1);
        for (int part = 0; part < 2; part++)
            CHECK(std::memcmp(&both[static_cast<size_t>((2 * part + b) * plan.nodes)], &alone[static_cast<size_t>(part * plan.nodes)], sizeof(int64_t) * static_cast<size_t>(plan.nodes)) == 0);
    }
}

// Chains that bear the highest token of each row are accepted to their end, the ones with another first token not at all.
void the_highest_is_followed(int columns, unsigned seed) {
    constexpr int BATCH = 3, NODES = 3;
    size_t wide = static_cast<size_t>(columns);
    Floats x = noise(BATCH * NODES * wide, seed), gumbel = noise(wide, seed + 1);
    const float temperatures[BATCH] = {0.0f, 0.5f, 0.0f}, *rows[BATCH * NODES] = {nullptr, nullptr, nullptr, gumbel.data(), gumbel.data(), gumbel.data()};
    std::vector<int64_t> highest(BATCH * NODES), tokens(BATCH * NODES), paths(BATCH * NODES), chosen(BATCH * NODES), accepted(BATCH);
    for (size_t r = 0; r < BATCH * NODES; r++) {
        float divisor = rows[r] ? 0.5f : 1.0f, best = 0;
        for (size_t i = 0; i < wide; i++) {
            float score = x[r * wide + i] / divisor + (rows[r] ? gumbel[i] : 0.0f);
            if (!i || score > best) best = score, highest[r] = static_cast<int64_t>(i);
        }
        if (r % NODES + 1 < NODES) tokens[r + 1] = highest[r];
    }
    tokens[2 * NODES + 1]++;
    const int64_t parents[BATCH * NODES] = {-1, 0, 1, -1, 0, 1, -1, 0, 1};
    const uint8_t candidate[BATCH * NODES] = {0, 1, 1, 0, 1, 1, 0, 1, 1};
    Trees trees{BATCH, NODES, NODES, tokens.data(), parents, candidate, temperatures, rows};
    CHECK(s4c_judge(&trees, x.data(), columns, paths.data(), chosen.data(), accepted.data()) == NODES - 1);
    for (size_t b = 0; b < BATCH; b++) {
        CHECK(accepted[b] == (b < 2 ? NODES - 1 : 0));
        for (size_t i = 0; i < NODES; i++) {
            CHECK(paths[b * NODES + i] == (b < 2 ? static_cast<int64_t>(i) : 0));
            CHECK(chosen[b * NODES + i] == highest[b * NODES + (b < 2 ? i : 0)]);
        }
    }
}

// A longer row begins with a shorter one, whatever the threads.
void noise_is_of_its_row_alone() {
    Floats longest(1000);
    s4c_set_threads(3);
    CHECK(s4c_noise(~0ull, 2, 1ull << 40, 1000, longest.data()) == 0);
    s4c_set_threads(1);
    for (int size : {1, 63, 64, 65, 999}) {
        Floats row(static_cast<size_t>(size));
        CHECK(s4c_noise(~0ull, 2, 1ull << 40, size, row.data()) == 0);
        CHECK(std::memcmp(row.data(), longest.data(), row.size() * sizeof(float)) == 0);
    }
}

// Low-rank terms act at the rows that are named: a row gets the same with and without them where they are not on its path.
void terms_act_at_their_rows_alone(int kind, unsigned seed) {
    constexpr int RANK = 3;
    Model model(kind, {33, 47, 8, 1, 20, false, true}, seed);
    std::vector<Floats> kept;
    std::vector<LowRank> terms(4 * Model::LAYERS);
    for (size_t l = 0; l < Model::LAYERS; l++) {
        Layer& layer = model.layers[l];
        size_t at = 4 * l;
        for (Linear* linear : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) {
            kept.push_back(noise(static_cast<size_t>(RANK * linear->inputs), seed));
            kept.push_back(noise(RANK * up(linear->outputs, 16), seed + 1));
            terms[at] = {RANK, kept[kept.size() - 2].data(), kept.back().data()};
            linear->low_rank = &terms[at++];
        }
    }
    Floats x = noise(6 * 33, seed);
    const Parents parents{-1, 0, 1, 0, 3, 0};
    const uint8_t adapted[] = {0, 0, 1, 0, 1, 1};
    Floats plain = model.run(x, 1, 0, parents), with = model.run(x, 1, 0, parents, 0, adapted);
    for (size_t r = 0; r < 6; r++) CHECK(same(model.row(plain, r), model.row(with, r)) == !adapted[r]);
    Floats path(x.begin(), x.begin() + 3 * 33);
    CHECK(same(model.row(model.run(path, 1, 0, {-1, 0, 1}, 0, adapted), 2), model.row(with, 2)));
}

// What a pass gives besides, behind its layers one by one, leaves the rest as it was.
void taps_are_given_as_well(int kind, unsigned seed) {
    Model model(kind, {20, 24, 2, 1, 10, false, false}, seed);
    const size_t count = 7, d = 20;
    Floats x = noise(count * d, seed + 1);
    Parents chain = {-1, 0, 1, 2, 3, 4, 5};
    Floats plain = model.run(x, 1, 1, chain), both = model.run(x, 1, 1, chain, 0, nullptr, {1, 2});
    Floats last = model.run(x, 1, 1, chain, 0, nullptr, {2});
    for (size_t row = 0; row < count; row++) {
        CHECK(std::memcmp(&both[row * 3 * d], &plain[row * d], d * sizeof(float)) == 0);
        CHECK(std::memcmp(&last[row * 2 * d], &plain[row * d], d * sizeof(float)) == 0);
        CHECK(std::memcmp(&last[row * 2 * d + d], &both[row * 3 * d + 2 * d], d * sizeof(float)) == 0);
        CHECK(std::memcmp(&both[row * 3 * d + d], &both[row * 3 * d + 2 * d], d * sizeof(float)) != 0);
    }
}

// A whole pass is its parts: embeddings, layers, LM head.
void a_whole_pass_is_its_parts(int kind, unsigned seed) {
    constexpr int VOCABULARY = 37;
    const size_t d = 33;
    Model model(kind, {33, 47, 8, 1, 20, false, true}, seed);
    Weights lm_head(kind, 33, VOCABULARY, seed + 50, false);
    Floats embedding = noise(VOCABULARY * d, seed + 51);
    const Decoder decoder{&model.stack, &model.cache, &lm_head.c, {embedding.data(), 0}};
    const std::vector<int64_t> tokens{5, 36, 0, 7, 7, 1};
    const Parents parents{-1, 0, 0, -1, 0, 1};
    for (const std::vector<int32_t>& taps : {std::vector<int32_t>{}, {1}}) {
        size_t wide = d * (1 + taps.size());
        Floats features(6 * wide), logits(6 * VOCABULARY), x, alone(VOCABULARY);
        for (int64_t token : tokens) x.insert(x.end(), embedding.begin() + token * 33, embedding.begin() + (token + 1) * 33);
        Floats expected = model.run(x, 2, 0, parents, 0, nullptr, taps);
        CHECK(s4c_verify(&decoder, tokens.data(), 2, 3, model.lengths.data(), parents.data(), taps.data(), static_cast<int>(taps.size()), features.data(),
                         logits.data()) == 0);
        CHECK(same(features, expected));
        for (size_t r = 0; r < 6; r++) {
            CHECK(s4c_linear(&lm_head.c, &expected[r * wide], 1, alone.data()) == 0);
            CHECK(std::memcmp(alone.data(), &logits[r * VOCABULARY], sizeof(float) * VOCABULARY) == 0);
        }
    }
}

// Callers at once, while the pool changes its size.
void callers_take_turns(int kind) {
    const Shape shape{20, 30, 4, 2, 8, false, false};
    std::vector<std::thread> callers;
    std::atomic<bool> wrong{false};
    for (unsigned caller = 0; caller < 3; caller++)
        callers.emplace_back([&, caller] {
            Model model(kind, shape, caller);
            Floats x = noise(7 * 20, caller);
            Parents parents{-1, 0, 0, 1, 1, 2, 5};
            Floats expected = model.run(x, 1, 0, parents);
            for (int turn = 0; turn < 12; turn++) {
                if (caller == 0) s4c_set_threads(1 + turn % 4);
                if (!same(model.run(x, 1, turn % 2, parents), expected)) wrong = true;
            }
        });
    for (auto& caller : callers) caller.join();
    CHECK(!wrong);
}

void powers_are_close() {
    float x[LANES], exact[LANES], rough[LANES];
    for (int step = 0; step < 87 * 64; step++) {
        for (int i = 0; i < LANES; i++) x[i] = -static_cast<float>(step * LANES + i) / (64 * LANES);
        store(exact, exponential(load(x)));
        store(rough, rough_exponential(load(x)));
        for (int i = 0; i < LANES; i++) {
            double power = std::exp(static_cast<double>(x[i]));
            CHECK(std::fabs(exact[i] / power - 1) < 4e-7);
            CHECK(std::fabs(rough[i] / power - 1) < 1e-5);
        }
    }
    store(rough, rough_exponential(set1(-INFINITY)));
    CHECK(rough[0] > 0 && rough[0] < 2e-38f);
    store(rough, rough_exponential(set1(NAN)));
    CHECK(std::isnan(rough[0]));
}

void check(const std::string& name) {
    CHECK(s4c_choose(name.c_str()) == 0);
    for (int kind : {FLOAT32, BFLOAT16, INT8}) {
        for (int threads : {1, 3}) {
            s4c_set_threads(threads);
            CHECK(s4c_threads() == threads);
            unsigned seed = 1;
            for (auto [inputs, outputs] : {std::pair{1, 1}, {7, 17}, {33, 80}, {200, 100}}) rows_know_no_other(kind, inputs, outputs, seed++);
            speculative_is_plain(kind, {17, 24, 6, 1, 6, true, false}, 0, 9, seed++);
            speculative_is_plain(kind, {33, 47, 8, 1, 20, false, true}, 21, 13, seed++);
            speculative_is_plain(kind, {64, 96, 5, 5, 80, false, false}, 64, 6, seed++);
            speculative_is_plain(kind, {1, 1, 1, 1, 2, false, false}, 3, 1, seed++);
            terms_act_at_their_rows_alone(kind, seed++);
            taps_are_given_as_well(kind, seed++);
            a_whole_pass_is_its_parts(kind, seed++);
        }
        callers_take_turns(kind);
        drafts_know_no_other_sequence(kind, true, 4, 300);
        drafts_know_no_other_sequence(kind, false, 4, 301);
    }
    for (int columns : {1, 16, 255, 1000}) the_highest_is_followed(columns, 7);
    noise_is_of_its_row_alone();
    s4c_set_threads(1);
}

}  // namespace

int main() {
    char names[256];
    powers_are_close();
    s4c_variants(names, sizeof(names));
    CHECK(s4c_choose("nonsense") == -1);
    std::string rest(names);
    while (!rest.empty()) {
        size_t comma = rest.find(',');
        std::string name = rest.substr(0, comma);
        check(name);
        std::printf("%s: all equal\n", name.c_str());
        std::fflush(stdout);
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    }
}

// A draft in one call: the heads of a drafter, one after the other over the rows of a round, and the tree that grows
// from what they say. `S4CDrafter` and `TreeBuilder` do the same at leisure; this is tested against them.
#include "core.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The tree of one sequence: a pool of nodes, the root first.
struct Tree {
    std::vector<int64_t> tokens, parents;
    std::vector<float> path;  // log of the probability
    std::vector<int> row;     // of the round, where the node has one
    std::vector<int> frontier;

    explicit Tree(int64_t root, int at) : tokens{root}, parents{-1}, path{0.0f}, row{at}, frontier{0} {}

    int size() const { return static_cast<int>(tokens.size()); }

    void add(int64_t token, int parent, float probability) {
        tokens.push_back(token), parents.push_back(parent), row.push_back(-1);
        path.push_back(probability > NEVER ? probability : NEVER);  // NaN never stands
    }

    // The nodes [begin, end) of highest probability, at most `count`; of equals the first.
    std::vector<int> best(int begin, int end, int count) const {
        std::vector<int> order(static_cast<size_t>(end - begin));
        std::iota(order.begin(), order.end(), begin);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return at(path, a) > at(path, b); });
        order.resize(static_cast<size_t>(std::min(count, end - begin)));
        return order;
    }

    template <class T>
    static T at(const std::vector<T>& values, int index) { return values[static_cast<size_t>(index)]; }
};

class Drafting {
   public:
    Drafting(const Heads& heads, const Plan& plan, const Round& round)
        : heads_(heads), plan_(plan), round_(round), batch_(round.batch), rows_(round.longest),
          hidden_(static_cast<size_t>(heads.stack[0]->hidden)) {
        for (int b = 0; b < batch_; b++) {
            const int64_t* line = round.tokens + static_cast<ptrdiff_t>(b) * rows_;
            int root = round.counts[b] - 1;
            trees_.emplace_back(line[root], root);
            tokens_.emplace_back(line, line + rows_);
            parents_.emplace_back(static_cast<size_t>(rows_));
            std::iota(parents_.back().begin(), parents_.back().end(), -1);
        }
    }

    void run() {
        outputs_.resize(static_cast<size_t>(heads_.count));
        int done = 0;
        for (int level = 0; open(level); level++) {
            if (level) expand();
            if (level < heads_.count) run_head(done++, 0, rows_);
            else run_head(heads_.count - 1, rows_ - width(), rows_);
            grow(level, outputs_[static_cast<size_t>(done - 1)]);
        }
        while (done < heads_.count) run_head(done++, 0, round_.longest);  // so that the caches of all heads stay level
        for (int b = 0; b < batch_; b++)
            for (int i = 0; i + 1 < heads_.count; i++)
                std::copy_n(row_of(i, b, round_.counts[b] - 1), hidden_, carry(b, i));
    }

    // The trees, in arrays of `most` columns; the number of columns used.
    int write(int most, int64_t* tokens, int64_t* parents, float* path, uint8_t* candidate) const {
        int size = std::min(trees_[0].size(), most);
        for (const Tree& tree : trees_) {
            std::vector<int> kept = tree.best(0, tree.size(), size);
            std::sort(kept.begin(), kept.end());
            std::vector<int64_t> place(static_cast<size_t>(tree.size()), -1);
            for (int column = 0; column < size; column++, tokens++, parents++, path++, candidate++) {
                int node = kept[static_cast<size_t>(column)];
                place[static_cast<size_t>(node)] = column;
                *tokens = Tree::at(tree.tokens, node);
                *parents = node ? place[static_cast<size_t>(Tree::at(tree.parents, node))] : -1;
                *path = Tree::at(tree.path, node);
                *candidate = node && std::isfinite(*path);
            }
        }
        return size;
    }

   private:
    int width() const { return static_cast<int>(trees_[0].frontier.size()); }

    bool open(int level) const { return level < plan_.depth && width(); }

    // How many of these nodes, the most probable of a level first, are to be gone on with: none where all their paths
    // together are below the floor. A child is never more probable than its parent, so none of those is kept whose path
    // does not beat the last one kept.
    int hopeful(const Tree& tree, const std::vector<int>& nodes) const {
        float last = NEVER, together = 0;
        for (int node : nodes) together += std::exp(Tree::at(tree.path, node));
        if (!(std::log(together) >= plan_.floor)) return 0;
        bool full = tree.size() >= plan_.nodes;
        if (full) last = Tree::at(tree.path, tree.best(0, tree.size(), plan_.nodes).back());
        auto without = std::find_if(nodes.begin(), nodes.end(), [&](int node) {
            return full && !(Tree::at(tree.path, node) > last);
        });
        return static_cast<int>(without - nodes.begin());
    }

    // The nodes of the frontier become rows of the round.
    void expand() {
        for (size_t b = 0; b < trees_.size(); b++) {
            int next = rows_;
            for (int node : trees_[b].frontier) {
                size_t at = static_cast<size_t>(node);
                tokens_[b].push_back(trees_[b].tokens[at]);
                parents_[b].push_back(Tree::at(trees_[b].row, static_cast<int>(trees_[b].parents[at])));
                trees_[b].row[at] = next++;
            }
        }
        rows_ += width();
    }

    float* carry(int b, int head) const {
        return round_.carry[b] + static_cast<size_t>(head) * hidden_;
    }

    const float* row_of(int head, int b, int row) const {
        const auto& output = outputs_[static_cast<size_t>(head)];
        return output.data() + (static_cast<size_t>(b) * (output.size() / hidden_ / static_cast<size_t>(batch_)) + static_cast<size_t>(row)) * hidden_;
    }

    // What a head reads beside the embedding of a row: the target's feature one position before it, or what the head
    // before it (past the last head: itself) gave there. Padding reads what the root reads.
    const float* input(int head, int b, int row, bool again) const {
        if (!head && !again) return round_.features[b] + static_cast<size_t>(std::min(row, round_.counts[b] - 1)) * hidden_;
        int before = again ? head : head - 1, parent = static_cast<int>(parents_[static_cast<size_t>(b)][static_cast<size_t>(row)]);
        return parent < 0 ? carry(b, before) : row_of(before, b, parent);
    }

    // One head over the rows [begin, end); those before `begin` it has run over in this round.
    void run_head(int head, int begin, int end) {
        int count = end - begin;
        bool again = begin > 0;
        std::vector<float> x(static_cast<size_t>(batch_ * count) * 2 * hidden_), out(static_cast<size_t>(batch_ * count) * hidden_);
        std::vector<int64_t> parents;
        float* pair = x.data();
        for (int b = 0; b < batch_; b++) {
            const auto& all = parents_[static_cast<size_t>(b)];
            parents.insert(parents.end(), all.begin(), all.begin() + end);
            for (int row = begin; row < end; row++, pair += 2 * hidden_) {
                heads_.embedding.read(tokens_[static_cast<size_t>(b)][static_cast<size_t>(row)], hidden_, pair);
                std::copy_n(input(head, b, row, again), hidden_, pair + hidden_);
            }
        }
        if (s4c_pass(heads_.stack[head], heads_.cache[head], x.data(), out.data(), batch_, count, begin, 0, round_.lengths, parents.data(), nullptr, nullptr, 0))
            throw std::bad_alloc();
        append(outputs_[static_cast<size_t>(head)], out);
    }

    // Puts the new rows of each sequence behind those that it has.
    void append(std::vector<float>& output, std::vector<float>& more) const {
        if (output.empty()) return output.swap(more);
        std::vector<float> both;
        size_t batch = static_cast<size_t>(batch_), old = output.size() / batch, added = more.size() / batch;
        for (size_t b = 0; b < batch; b++) {
            both.insert(both.end(), output.begin() + static_cast<ptrdiff_t>(b * old), output.begin() + static_cast<ptrdiff_t>((b + 1) * old));
            both.insert(both.end(), more.begin() + static_cast<ptrdiff_t>(b * added), more.begin() + static_cast<ptrdiff_t>((b + 1) * added));
        }
        output.swap(both);
    }

    // Children for every node of the frontier, by the LM head's scores of their rows, and the next frontier.
    void grow(int level, const std::vector<float>& output) {
        int rows = batch_ * width();
        std::vector<float> x;
        size_t stride = output.size() / static_cast<size_t>(batch_);
        for (int b = 0; b < batch_; b++)
            for (int node : trees_[static_cast<size_t>(b)].frontier) {
                auto at = output.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(b) * stride) +
                          static_cast<ptrdiff_t>(static_cast<size_t>(Tree::at(trees_[static_cast<size_t>(b)].row, node)) * hidden_);
                x.insert(x.end(), at, at + static_cast<ptrdiff_t>(hidden_));
            }
        std::vector<std::vector<float>> further = further_logits(x);
        for (int i = 0; i < heads_.products; i++) {
            std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(heads_.lm_head[i]->outputs));
            if (s4c_linear(heads_.lm_head[i], x.data(), rows, y.data())) throw std::bad_alloc();
            x.swap(y);
        }
        int columns = heads_.lm_head[heads_.products - 1]->outputs, children = std::min(plan_.width, columns);
        std::vector<Choice> choices;
        for (int b = 0; b < batch_; b++) {
            float* logits = x.data() + static_cast<size_t>(b * width()) * static_cast<size_t>(columns);
            if (round_.texts) echo(b, logits, columns, further[static_cast<size_t>(b)]);
            choices.push_back(choose(logits, columns, children, heads_.token_ids, b, level));
            if (further[static_cast<size_t>(b)].empty()) continue;
            int more = round_.further[b]->outputs;
            choices.back().join(choose(further[static_cast<size_t>(b)].data(), more, std::min(children, more), round_.further_ids[b], b, level));
        }
        for (size_t b = 0; b < trees_.size(); b++)
            for (int w = 0; w < width(); w++) {
                Tree& tree = trees_[b];
                int parent = tree.frontier[static_cast<size_t>(w)];
                const Choice& of = choices[b];
                float above = Tree::at(tree.path, parent), total = std::max(of.totals[static_cast<size_t>(w)], std::numeric_limits<float>::lowest());
                for (int child = 0; child < children; child++) {
                    size_t i = static_cast<size_t>(w * children + child);
                    tree.add(of.tokens[i], parent, above + (of.values[i] - total));
                }
            }
        int fresh = width() * children, wanted = plan_.best ? 0 : 1;
        for (Tree& tree : trees_) {
            tree.frontier = tree.best(tree.size() - fresh, tree.size(), plan_.expanded);
            if (plan_.best) wanted = std::max(wanted, hopeful(tree, tree.frontier));
        }
        for (Tree& tree : trees_) {
            if (plan_.best) tree.frontier.resize(static_cast<size_t>(wanted));
            else tree.frontier = {tree.size() - fresh};
        }
    }

    // Of each sequence the logits [width, outputs] of the tokens that it may draft besides, from its rows of x.
    std::vector<std::vector<float>> further_logits(const std::vector<float>& x) const {
        std::vector<std::vector<float>> logits(static_cast<size_t>(batch_));
        for (int b = 0; b < batch_; b++) {
            const Linear* linear = round_.further[b];
            if (!linear || !linear->outputs) continue;
            auto& of = logits[static_cast<size_t>(b)];
            of.resize(static_cast<size_t>(width()) * static_cast<size_t>(linear->outputs));
            if (s4c_linear(linear, x.data() + static_cast<size_t>(b * width()) * hidden_, width(), of.data())) throw std::bad_alloc();
        }
        return logits;
    }

    // Adds to the laws of a sequence's frontier what followed in its text (s4c/drafters/echo.py): logits [width, columns], and
    // those of the tokens that it may draft besides.
    void echo(int b, float* logits, int columns, std::vector<float>& further) const {
        int more = further.empty() ? 0 : round_.further[b]->outputs;
        std::vector<float> total = totals(logits, columns), other = more ? totals(further.data(), more) : std::vector<float>(total.size(), NEVER);
        const int64_t* end = heads_.token_ids + columns;
        for (size_t w = 0; w < total.size(); w++) {
            float high = std::max(total[w], other[w]), low = std::min(total[w], other[w]);
            float all = high > NEVER ? high + std::log1p(std::exp(low - high)) : NEVER;
            for (const auto& [token, weight] : heard(b, trees_[static_cast<size_t>(b)].frontier[w])) {
                const int64_t* id = std::lower_bound(heads_.token_ids, end, token);
                float* at = nullptr;
                if (id != end && *id == token) {
                    at = logits + w * static_cast<size_t>(columns) + (id - heads_.token_ids);
                } else {
                    const int64_t* ids = round_.further_ids[b];
                    const int64_t* found = std::find(ids, ids + more, token);
                    if (found != ids + more) at = further.data() + w * static_cast<size_t>(more) + (found - ids);
                }
                if (!at || !(*at > NEVER)) continue;
                float said = all + std::log(weight), most = std::max(*at, said);
                *at = most + std::log1p(std::exp(std::min(*at, said) - most));
            }
        }
    }

    std::vector<float> totals(const float* logits, int columns) const {
        std::vector<float> values(static_cast<size_t>(width())), total(values.size());
        std::vector<int64_t> indices(values.size());
        if (s4c_top(logits, width(), columns, 1, values.data(), indices.data(), total.data())) throw std::bad_alloc();
        return total;
    }

    // The tokens that followed in the text where the last ones of a node's path stood, and what they weigh.
    std::vector<std::pair<int64_t, float>> heard(int b, int node) const {
        const Tree& tree = trees_[static_cast<size_t>(b)];
        const int64_t* text = round_.texts[b];
        int length = round_.text_lengths[b];
        std::vector<int64_t> path;  // backwards
        for (; node > 0; node = static_cast<int>(Tree::at(tree.parents, node))) path.push_back(Tree::at(tree.tokens, node));
        for (int at = length - 1; at >= 0 && static_cast<int>(path.size()) < round_.echo_longest; at--) path.push_back(text[at]);
        int longest = std::min(round_.echo_longest, static_cast<int>(path.size()));
        std::vector<std::pair<int64_t, float>> found;
        for (int place = 0; place + 1 < length; place++) {
            if (text[place] != path[0]) continue;
            int same = 1;
            while (same < longest && same <= place && text[place - same] == path[static_cast<size_t>(same)]) same++;
            if (same < round_.echo_telling && place < length - round_.echo_near) continue;
            auto known = std::find_if(found.begin(), found.end(), [&](const auto& of) { return of.first == text[place + 1]; });
            if (known == found.end()) known = found.insert(known, {text[place + 1], 0.0f});
            known->second += round_.echo[same - 1];
        }
        return found;
    }

    // The best children of the nodes of a frontier.
    struct Choice {
        int children;
        std::vector<float> values, totals;  // [width, children]; [width], of all that there was to choose from
        std::vector<int64_t> tokens;

        // Takes in what another vocabulary offers: of equals its own stay first.
        void join(const Choice& other) {
            for (size_t w = 0; w < totals.size(); w++) {
                float high = std::max(totals[w], other.totals[w]), low = std::min(totals[w], other.totals[w]);
                if (high > NEVER) totals[w] = high + std::log1p(std::exp(low - high));
                size_t begin = w * static_cast<size_t>(children), end = begin + static_cast<size_t>(children);
                size_t others = w * static_cast<size_t>(other.children);
                for (size_t i = others; i < others + static_cast<size_t>(other.children); i++) {
                    size_t at = end;
                    while (at > begin && values[at - 1] < other.values[i]) at--;
                    if (at == end) break;
                    for (size_t j = end - 1; j > at; j--) values[j] = values[j - 1], tokens[j] = tokens[j - 1];
                    values[at] = other.values[i], tokens[at] = other.tokens[i];
                }
            }
        }
    };

    // By logits [width, columns], which become log q at the request's temperature plus the noise of the position.
    Choice choose(float* logits, int columns, int children, const int64_t* ids, int b, int level) const {
        for (int w = 0; w < width(); w++) score(logits + static_cast<size_t>(w) * static_cast<size_t>(columns), columns, ids, b, level);
        size_t rows = static_cast<size_t>(width()), picked = rows * static_cast<size_t>(children);
        Choice out{children, std::vector<float>(picked), std::vector<float>(rows), std::vector<int64_t>(picked)};
        if (s4c_top(logits, width(), columns, children, out.values.data(), out.tokens.data(), out.totals.data())) throw std::bad_alloc();
        for (int64_t& token : out.tokens) token = ids[token];
        return out;
    }

    void score(float* logits, int columns, const int64_t* ids, int b, int level) const {
        float temperature = round_.temperatures[b];
        if (temperature == 0.0f) return;
        const float* noise = round_.noise[static_cast<ptrdiff_t>(b) * plan_.depth + level];
        for (int j = 0; j < columns; j++) {
            float cooled = logits[j] / temperature;
            logits[j] = noise ? cooled + noise[ids[j]] : cooled;
        }
    }

    const Heads& heads_;
    const Plan& plan_;
    const Round& round_;
    const int batch_;
    int rows_;
    const size_t hidden_;
    std::vector<Tree> trees_;
    std::vector<std::vector<int64_t>> tokens_, parents_;  // of the rows of each sequence
    std::vector<std::vector<float>> outputs_;             // [batch, rows, hidden] of each head
};

}  // namespace

int s4c_draft(const Heads* heads, const Plan* plan, const Round* round, int most, int64_t* tokens, int64_t* parents, float* path,
              uint8_t* candidate) {
    try {
        Drafting drafting(*heads, *plan, *round);
        drafting.run();
        return drafting.write(most, tokens, parents, path, candidate);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// The plain C interface: threads, the choice of the instruction set, working memory.
#include "core.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <pthread.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// How often a thread looks again before it lets others run: at a barrier, where the rest of the team may need this very
// core, and between jobs, for some milliseconds, longer than a round pauses.
constexpr int BARRIER_SPINS = 1000, IDLE_SPINS = 60000;

// Threads that share a job. The caller is thread 0; the others sleep between jobs.
class Pool {
   public:
    ~Pool() { resize(1); }

    int size() const { return static_cast<int>(threads_.size()) + 1; }

    // As many threads as the system gives, and no more than that; says how many.
    int resize(int threads) {
        if (threads == size()) return threads;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            generation_++;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
        threads_.clear();
        stopping_ = false;
        try {
            for (int t = 1; t < threads; t++) threads_.emplace_back([this, t, seen = generation_.load()] { serve(t, seen); });
        } catch (const std::system_error&) {
        }
        return size();
    }

    void run(const std::function<void(Team)>& job) {
        job_ = &job;
        arrived_ = 0;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            generation_++;
        }
        if (size() > 1) wake_.notify_all();
        job({0, size(), this, &Pool::wait});
        wait(this);
    }

   private:
    static void wait(void* self) {
        auto& pool = *static_cast<Pool*>(self);
        unsigned phase = pool.phase_.load(std::memory_order_acquire);
        if (pool.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == pool.size()) {
            pool.arrived_.store(0, std::memory_order_relaxed);
            pool.phase_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spins = 0; pool.phase_.load(std::memory_order_acquire) == phase; spins++)
            spins < BARRIER_SPINS ? relax() : std::this_thread::yield();
    }

    void serve(int thread, unsigned seen) {
        for (;;) {
            for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < IDLE_SPINS; spins++) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (stopping_) return;
            }
            (*job_)({thread, size(), this, &Pool::wait});
            wait(this);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> generation_{0}, phase_{0};
    std::atomic<int> arrived_{0};
    bool stopping_ = false;
    const std::function<void(Team)>* job_ = nullptr;
};

struct Variant {
    const char* name;
    const Kernels* (*kernels)();
    bool (*runs)();
};

#if defined(__x86_64__)
bool amx_runs() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    bool tiles = (d >> 24 & 1) && (d >> 22 & 1) && (d >> 25 & 1);
    constexpr int request_permission = 0x1023, tile_data = 18;
    return tiles && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
bool avx512_runs() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
bool avx512bf16_runs() {
    return avx512_runs() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
bool avx2_runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const Variant VARIANTS[] = {
#if defined(S4C_WITH_AMX)
    {"amx", kernels_amx, amx_runs},
#endif
#if defined(S4C_WITH_AVX512BF16)
    {"avx512bf16", kernels_avx512bf16, avx512bf16_runs},
#endif
#if defined(S4C_WITH_AVX512)
    {"avx512", kernels_avx512, avx512_runs},
#endif
#if defined(S4C_WITH_AVX2)
    {"avx2", kernels_avx2, avx2_runs},
#endif
    {"portable", kernels_portable, [] { return true; }},
};

// Memory that grows and stays, at cache lines.
class Buffer {
   public:
    ~Buffer() { std::free(data_); }

    template <class T>
    T* get(size_t count) {
        size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(64, bytes);
            if (!data_) throw std::bad_alloc();
            std::memset(data_, 0, bytes);
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

struct Core {
    std::mutex mutex;  // one pass at a time
    Pool pool;
    int threads = 1;
    const Variant* variant = nullptr;
    Buffer embedded, x, wide, inputs, scales, context, angles, scores, inner;
    std::vector<int32_t> slot, prefix, path_start, path;
};

Core* the_core = new Core;  // never destroyed: threads may outlive static objects

#if defined(__unix__)
// A forked child has none of the threads: it starts afresh and leaves the parent's core alone.
void start_afresh() {
    auto* fresh = new Core;
    fresh->variant = the_core->variant;
    fresh->threads = the_core->threads;
    the_core = fresh;
}
const int at_fork = pthread_atfork(nullptr, nullptr, start_afresh);
#endif

Core& core() { return *the_core; }

// One job of all threads; -1 where memory ran out, for no exception may leave the C interface.
template <class Work>
int guarded(Work work) {
    Core& c = core();
    std::lock_guard<std::mutex> lock(c.mutex);
    try {
        c.threads = c.pool.resize(c.threads);
        work(c);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// Halves may be kept as wide as they were before they were rounded.
size_t input_bytes(const Linear& linear) { return static_cast<size_t>(linear.padded) * (linear.kind == INT8 ? 1 : 4); }

// The rows that each new row sees, as a prefix and a path of cache rows: up from parent to parent. A path that goes
// on where the prefix ends becomes part of it.
Rows read_rows(Core& c, int batch, int count, int pending, int first_slot, const int32_t* lengths, const int64_t* parents) {
    c.slot.clear(), c.prefix.clear(), c.path_start.assign(1, 0), c.path.clear();
    for (int b = 0; b < batch; b++, parents += pending + count)
        for (int r = pending; r < pending + count; r++) {
            size_t start = c.path.size();
            for (int64_t row = r; row >= 0; row = parents[row]) c.path.push_back(lengths[b] + static_cast<int32_t>(row));
            std::reverse(c.path.begin() + static_cast<std::ptrdiff_t>(start), c.path.end());
            size_t joined = start;
            int32_t prefix = lengths[b];
            while (joined + 1 < c.path.size() && c.path[joined] == prefix) joined++, prefix++;
            c.path.erase(c.path.begin() + static_cast<std::ptrdiff_t>(start), c.path.begin() + static_cast<std::ptrdiff_t>(joined));
            c.slot.push_back(first_slot + b);
            c.prefix.push_back(prefix);
            c.path_start.push_back(static_cast<int32_t>(c.path.size()));
        }
    return {batch * count, c.slot.data(), c.prefix.data(), c.path_start.data(), c.path.data()};
}

// Working memory of a pass, and of a product after it that reads so many bytes of a row.
Scratch scratch_of(Core& c, const Stack& stack, const Cache& cache, int count, const uint8_t* adapted, const int32_t* taps, int tap_count,
                   size_t input) {
    size_t n = static_cast<size_t>(count), hidden = static_cast<size_t>(stack.hidden), rank = 0;
    size_t qkv = static_cast<size_t>(stack.heads + 2 * stack.kv_heads) * static_cast<size_t>(stack.head_dim);
    size_t widest = std::max({qkv, stack.join_norm ? 2 * hidden : hidden, static_cast<size_t>(stack.intermediate)});
    const Layer& first = *stack.layer;
    for (const Linear* linear : {&first.qkv, &first.out, &first.gate_up, &first.down}) {
        input = std::max(input, input_bytes(*linear));
        if (adapted && linear->low_rank) rank = std::max(rank, static_cast<size_t>(linear->low_rank->rank));
    }
    if (stack.join_norm) input = std::max(input, input_bytes(stack.join));
    Scratch s;
    s.wide_stride = round_up(widest, 16) + 16;
    s.input_stride = round_up(input, 64) + 64;
    s.row_scores = round_up(static_cast<size_t>(cache.rows), 16) + 64;
    size_t deep = round_up(static_cast<size_t>(stack.head_dim), 32);
    s.score_stride = MOST_QUERIES * (s.row_scores + deep) + (cache.half ? 16 / 2 * (s.row_scores + deep) : 0);
    s.x = c.x.get<float>(n * hidden);
    s.wide = c.wide.get<float>(n * s.wide_stride);
    s.inputs = c.inputs.get<char>(round_up(n, 16) * s.input_stride);
    s.scales = c.scales.get<float>(n);
    s.context = c.context.get<float>(n * s.wide_stride);
    s.angles = c.angles.get<float>(n * static_cast<size_t>(stack.head_dim));
    s.scores = c.scores.get<float>(static_cast<size_t>(c.pool.size()) * s.score_stride);
    s.adapted = adapted;
    s.taps = taps;
    s.tap_count = tap_count;
    s.inner_stride = rank;
    s.inner = c.inner.get<float>(n * rank);
    return s;
}

template <class Place>
void keep_rows(const Cache& cache, int layers, int heads, int head_dim, int slot, int start, const int32_t* rows, int count) {
    for (int layer = 0; layer < layers; layer++)
        for (int head = 0; head < heads; head++) {
            Place at(cache, place_of(cache, heads, layer, slot, head), head_dim);
            for (int i = 0; i < count; i++) {
                size_t from = static_cast<size_t>(start + rows[i]), to = static_cast<size_t>(start + i);
                if (from == to) continue;
                for (size_t k = 0; k < static_cast<size_t>(head_dim); k++) *at.key(to, k) = *at.key(from, k), *at.value(to, k) = *at.value(from, k);
            }
        }
}

}  // namespace

void s4c_variants(char* out, int size) {
    std::string names;
    for (const auto& variant : VARIANTS)
        if (variant.runs()) names += (names.empty() ? "" : ",") + std::string(variant.name);
    std::strncpy(out, names.c_str(), static_cast<size_t>(size) - 1);
    out[size - 1] = 0;
}

int s4c_choose(const char* name) {
    std::lock_guard<std::mutex> lock(core().mutex);
    for (const auto& variant : VARIANTS)
        if (std::strcmp(name, variant.name) == 0 && variant.runs()) {
            core().variant = &variant;
            return 0;
        }
    return -1;
}

void s4c_set_threads(int threads) {
    std::lock_guard<std::mutex> lock(core().mutex);
    core().threads = threads;
}

int s4c_threads() {
    std::lock_guard<std::mutex> lock(core().mutex);
    return core().threads;
}

int s4c_pass(const Stack* stack, const Cache* cache, const float* x, float* out, int batch, int count, int pending,
             int first_slot, const int32_t* lengths, const int64_t* parents, const uint8_t* adapted, const int32_t* taps,
             int tap_count) {
    return guarded([&](Core& c) {
        Rows rows = read_rows(c, batch, count, pending, first_slot, lengths, parents);
        Scratch s = scratch_of(c, *stack, *cache, rows.count, adapted, taps, tap_count, 0);
        auto kernel = c.variant->kernels()->pass;
        c.pool.run([&](Team team) { kernel(*stack, *cache, rows, x, s, out, team); });
    });
}

int s4c_verify(const Decoder* decoder, const int64_t* tokens, int batch, int count, const int32_t* lengths, const int64_t* parents,
               const int32_t* taps, int tap_count, float* features, float* logits) {
    auto outside = [&](int64_t token) { return token < 0 || token >= decoder->lm_head->outputs; };
    if (std::any_of(tokens, tokens + batch * count, outside)) return -2;
    return guarded([&](Core& c) {
        Rows rows = read_rows(c, batch, count, 0, 0, lengths, parents);
        Scratch s = scratch_of(c, *decoder->stack, *decoder->cache, rows.count, nullptr, taps, tap_count, input_bytes(*decoder->lm_head));
        size_t hidden = static_cast<size_t>(decoder->stack->hidden);
        float* x = c.embedded.get<float>(static_cast<size_t>(rows.count) * hidden);
        for (int r = 0; r < rows.count; r++) decoder->embedding.read(tokens[r], hidden, x + hidden * static_cast<size_t>(r));
        const Kernels& kernels = *c.variant->kernels();
        c.pool.run([&](Team team) {
            kernels.pass(*decoder->stack, *decoder->cache, rows, x, s, features, team);
            kernels.linear(*decoder->lm_head, features, hidden * static_cast<size_t>(1 + tap_count), rows.count, s, logits, team);
        });
    });
}

int s4c_linear(const Linear* linear, const float* x, int count, float* out) {
    return guarded([&](Core& c) {
        size_t n = static_cast<size_t>(count);
        Scratch s{};
        s.input_stride = round_up(input_bytes(*linear), 64) + 64;
        s.inputs = c.inputs.get<char>(round_up(n, 16) * s.input_stride);
        s.scales = c.scales.get<float>(n);
        auto kernel = c.variant->kernels()->linear;
        c.pool.run([&](Team team) { kernel(*linear, x, static_cast<size_t>(linear->inputs), count, s, out, team); });
    });
}

int s4c_top(const float* x, int count, int columns, int k, float* values, int64_t* indices, float* totals) {
    return guarded([&](Core& c) {
        auto kernel = c.variant->kernels()->top;
        c.pool.run([&](Team team) { kernel(x, count, columns, k, values, indices, totals, team); });
    });
}

int s4c_judge(const Trees* trees, const float* logits, int columns, int64_t* paths, int64_t* tokens, int64_t* accepted) {
    int status = guarded([&](Core& c) {
        auto kernel = c.variant->kernels()->judge;
        c.pool.run([&](Team team) { kernel(*trees, logits, columns, paths, tokens, accepted, team); });
    });
    return status < 0 ? status : static_cast<int>(*std::max_element(accepted, accepted + trees->batch));
}

int s4c_noise(uint64_t seed, uint32_t stream, uint64_t position, int size, float* out) {
    return guarded([&](Core& c) {
        auto kernel = c.variant->kernels()->noise;
        c.pool.run([&](Team team) { kernel(seed, stream, position, size, out, team); });
    });
}

void s4c_keep(const Cache* cache, int layers, int heads, int head_dim, int slot, int start, const int32_t* rows, int count) {
    std::lock_guard<std::mutex> lock(core().mutex);
    if (cache->half) keep_rows<HalfRows>(*cache, layers, heads, head_dim, slot, start, rows, count);
    else keep_rows<FloatRows>(*cache, layers, heads, head_dim, slot, start, rows, count);
}

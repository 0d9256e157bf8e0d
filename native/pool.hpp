// Threads that take the pieces of one task at a time.
//
// Whoever is free takes the next piece, so a thread that has lost its core delays one piece and not the whole task.
// Waiting threads spin for a short time and then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

class Pool {
   public:
    explicit Pool(int threads) {
        try {
            for (int i = 1; i < threads; i++) workers.emplace_back([this] { work(); });
        } catch (const std::system_error &) {  // the system allows no more threads: those that there are compute
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleeping);
            stopped = true;
        }
        wake.notify_all();
        for (auto &worker : workers) worker.join();
    }

    int size() const { return int(workers.size()) + 1; }

    // Calls function(i) for each i in [0, pieces), in any order, and returns when all calls have returned.
    template <class Function>
    void run(int64_t pieces, const Function &function) {
        if (pieces > 1 && !workers.empty() && busy.try_lock()) {
            std::lock_guard<std::mutex> lock(busy, std::adopt_lock);
            share(uint32_t(pieces), [](const void *f, int64_t i) { (*static_cast<const Function *>(f))(i); }, &function);
        } else {  // one thread, or another caller has the workers
            for (int64_t i = 0; i < pieces; i++) function(i);
        }
    }

   private:
    using Call = void (*)(const void *function, int64_t piece);

    static constexpr auto SPIN = std::chrono::microseconds(100);

    std::vector<std::thread> workers;
    std::mutex busy, sleeping;
    std::condition_variable wake, finished;
    std::atomic<bool> stopped{false};
    // The task's number in the upper half and its next piece in the lower one. A piece is taken by compare-and-swap, which
    // fails if the task has changed since its function was read.
    alignas(64) std::atomic<uint64_t> next{0};
    alignas(64) std::atomic<uint32_t> unfinished{0};
    std::atomic<uint32_t> pieces{0};
    std::atomic<Call> call{nullptr};
    std::atomic<const void *> function{nullptr};

    void share(uint32_t count, Call new_call, const void *new_function) {
        next |= UINT32_MAX;  // no piece of the last task can be taken while the fields below change
        pieces = count;
        call = new_call;
        function = new_function;
        unfinished = count;
        next = ((next >> 32) + 1) << 32;
        {
            std::lock_guard<std::mutex> lock(sleeping);  // a worker about to sleep sees either the task or the notification
        }
        wake.notify_all();
        take();
        if (!spin([this] { return unfinished == 0; })) {
            std::unique_lock<std::mutex> lock(sleeping);
            finished.wait(lock, [this] { return unfinished == 0; });
        }
    }

    void work() {
        uint64_t done = 0;
        while (!stopped) {
            auto has_task = [&] { return (next >> 32) != done || stopped; };
            if (!spin(has_task)) {
                std::unique_lock<std::mutex> lock(sleeping);
                wake.wait(lock, has_task);
            }
            done = next >> 32;
            take();
        }
    }

    // Takes pieces until none is left.
    void take() {
        uint64_t ticket = next;
        for (;;) {
            const uint32_t count = pieces;
            const Call run_piece = call;
            const void *argument = function;
            if (uint32_t(ticket) >= count) return;
            if (!next.compare_exchange_weak(ticket, ticket + 1)) continue;
            run_piece(argument, uint32_t(ticket));
            if (--unfinished == 0) {
                { std::lock_guard<std::mutex> lock(sleeping); }
                finished.notify_one();
            }
            ticket = next;
        }
    }

    template <class Condition>
    static bool spin(const Condition &condition) {
        const auto start = std::chrono::steady_clock::now();
        do {
            for (int i = 0; i < 64; i++) {
                if (condition()) return true;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        } while (std::chrono::steady_clock::now() - start < SPIN);
        return false;
    }
};

// The tile registers of AMX, which hold up to 16 rows of 64 bytes each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vector.hpp"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>

// Asks the system to let this process use the registers. Returns whether it does.
inline bool request_tile_registers() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

constexpr int64_t REGISTER_ROWS = 16, REGISTER_BYTES = 1024;

// The size of each register, in the layout of the instruction.
struct TileSizes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileSizes) == 64);

// The calling thread's use of the registers, which ends with this object.
class TileRegisters {
   public:
    TileRegisters() = default;
    explicit TileRegisters(const TileSizes &sizes) { resize(sizes); }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters &) = delete;

    // The function of GCC 12 does not tell the compiler that all of the sizes are read.
    static void resize(const TileSizes &sizes) { asm volatile("ldtilecfg %0" : : "m"(sizes) : "memory"); }
};

// The compiler's own functions take registers' numbers as literals only.
template <int REGISTER>
inline void load_register(const char *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(REGISTER) : "memory");
}
template <int REGISTER>
inline void store_register(char *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(REGISTER) : "memory");
}
template <int REGISTER>
inline void clear_register() {
    asm volatile("tilezero %%tmm%c0" : : "i"(REGISTER));
}
template <int SUM, int X, int WEIGHTS>
inline void add_products(bf16) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHTS));
}
template <int SUM, int X, int WEIGHTS>
inline void add_products(Int8) {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHTS));
}

// Calls a function with each number below COUNT, as a constant.
template <int COUNT, class Function>
__attribute__((always_inline)) inline void for_each(const Function &function) {
    if constexpr (COUNT > 0) {
        for_each<COUNT - 1>(function);
        function(std::integral_constant<int, COUNT - 1>{});
    }
}
#endif

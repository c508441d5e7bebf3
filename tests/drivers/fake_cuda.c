/* CUDA's driver API over a shared file: "device memory" that all processes see, and that dies with its process.
 *
 * The file (TABLE) is a header and one slot per process that has a context. An allocation is a number; it is resident
 * only when it was set. What a dead process had does not count any more, as with the kernel driver of a real device.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS 64
#define CONTEXT (64ull << 20) /* what a context costs */

typedef struct { int64_t pid; uint64_t allocated, resident; } Slot;
typedef struct {
    uint64_t total;
    uint64_t delay_us;   /* per allocation: a test can act in between */
    uint64_t devices;
    uint64_t allocations; /* ever made */
    Slot slot[SLOTS];
} Table;

static Table *table;
static int lock = -1;
static Slot *mine;
static uint64_t sizes[4096], next_pointer = 1;

static int alive(int64_t pid) {
    char path[64], state = 0;
    if (!pid) return 0;
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    if (fscanf(f, "%*d (%*[^)]) %c", &state) != 1) state = 0;
    fclose(f);
    return state && state != 'Z' && state != 'X';
}

static uint64_t used(void) {
    uint64_t sum = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (table->slot[i].pid && !alive(table->slot[i].pid)) memset(&table->slot[i], 0, sizeof(Slot));
        if (table->slot[i].pid) sum += table->slot[i].allocated + CONTEXT;
    }
    return sum;
}

int cuInit(unsigned flags) {
    (void)flags;
    lock = open(TABLE, O_RDWR | O_CLOEXEC);
    if (lock < 0) return 100;
    table = mmap(0, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, lock, 0);
    if (table == MAP_FAILED) return 999;
    return table->devices ? 0 : 100;
}

int cuDeviceGetCount(int *count) { *count = (int)table->devices; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index < (int)table->devices ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Test device %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = table->total; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, 0x11 * (device + 1), 16); return 0; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
    int code = 2;
    (void)device;
    *context = &table;
    if (mine) return 0;
    flock(lock, LOCK_EX);
    if (used() + CONTEXT <= table->total)
        for (int i = 0; i < SLOTS && !mine; i++)
            if (!table->slot[i].pid) { mine = &table->slot[i]; mine->pid = getpid(); code = 0; }
    flock(lock, LOCK_UN);
    return code;
}

int cuCtxSetCurrent(void *context) { return context == &table ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    flock(lock, LOCK_EX);
    *total = table->total;
    *free = table->total - used();
    flock(lock, LOCK_UN);
    return 0;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
    int code = 2;
    usleep((useconds_t)table->delay_us);
    flock(lock, LOCK_EX);
    if (mine && next_pointer < 4096 && used() + size <= table->total) {
        mine->allocated += size;
        sizes[*pointer = next_pointer++] = size;
        table->allocations++;
        code = 0;
    }
    flock(lock, LOCK_UN);
    return code;
}

int cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t size) {
    (void)value;
    if (pointer >= next_pointer || sizes[pointer] < size) return 1;
    mine->resident += size;
    return 0;
}

int cuMemFree_v2(uint64_t pointer) {
    if (pointer >= next_pointer || !sizes[pointer]) return 1;
    flock(lock, LOCK_EX);
    mine->allocated -= sizes[pointer];
    sizes[pointer] = 0;
    flock(lock, LOCK_UN);
    return 0;
}

int cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : "some error"; return 0; }

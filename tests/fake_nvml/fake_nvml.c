/* A FAKE libnvidia-ml.so.1, for tests on machines without a GPU.
 *
 * The GPUs live in the file named by AGFT_FAKE_NVML: one page of header, then one page a GPU, laid
 * out as the structures below, which fake_nvml.py repeats. A call takes the file's flock, reads
 * one page, brings it to the present, acts and writes it back; the kernel completes a write within
 * a page and drops the flock of a killed process, so a kill at any moment harms no one else.
 * With -DOLD_DRIVER it is a driver that lacks the event reasons, the power fields and
 * nvmlDeviceGetTemperatureV.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_GPUS = 8 };
enum { MIN_MHZ = 210, MAX_MHZ = 1980, STEP_MHZ = 15, MEMORY_MHZ = 2619 };
enum { MIN_LIMIT_MW = 200000, MAX_LIMIT_MW = 700000 };
enum { IDLE_REASON = 0x1, POWER_CAP_REASON = 0x4 };
enum { SYMBOLIC_CLOCKS = 0xffffff00u };
typedef enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25
} Code;
/* READ_GROUP stands for every group before it, ANY_GROUP for all of them. */
enum { ENERGY, POWER, REASONS, CLOCK, INFO, READ_GROUP, HANDLE, SET, RESET, ANY_GROUP, GROUPS };
enum { FIELD = 0x100 }; /* added to a group: one field of a call that was counted already */

typedef struct { uint64_t calls; int64_t code, after, times; double delay_s; } Group;
typedef struct { uint32_t min_mhz, max_mhz; } Range; /* zeros: nothing locked */
typedef struct { char magic[16]; uint64_t gpus; Group init; } Header;
typedef struct {
    char uuid[80], name[96], bus_id[32];
    double busy, settle_s, counter_update_s;
    double energy_j, counter_j; /* exact; as the GPU shows it */
    int64_t t_ns, counter_realtime_us, change_ns;
    Range applied, locked; /* `locked` is applied at change_ns */
    uint64_t event_reasons;
    uint32_t forced_mhz, clamp_steps, counter_stuck, power_limit_mw;
    int32_t mig_mode, mig_pending; /* -1: not supported */
    uint32_t persistence_mode, virtualization_mode, temperature_c, reserved;
    Group groups[GROUPS];
} Gpu;
_Static_assert(sizeof(Gpu) <= PAGE && sizeof(Header) <= PAGE, "a record exceeds its page");
const size_t fake_nvml_gpu_size = sizeof(Gpu);

typedef struct { char unused; } *Device;
static struct { char unused; } devices[MAX_GPUS];
static int init_count;

/* --- the state file ------------------------------------------------------------------------ */

static int64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void lock(int fd) {
    while (flock(fd, LOCK_EX) < 0 && errno == EINTR) {}
}

static void unlock_and_close(int fd) {
    flock(fd, LOCK_UN); /* close alone would leave it to a child forked in between */
    close(fd);
}

static int open_state(Header *header) {
    const char *path = getenv("AGFT_FAKE_NVML");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return -1;
    lock(fd);
    if (pread(fd, header, sizeof *header, 0) == sizeof *header && !strcmp(header->magic, "fake_nvml 1"))
        return fd;
    unlock_and_close(fd);
    return -1;
}

static off_t page_of(unsigned index) { return (off_t)(index + 1) * PAGE; }

/* --- physics, as in fake_nvml.py ----------------------------------------------------------- */

static double power_w(unsigned mhz, double busy) { return busy ? 60 + 0.00012 * mhz * mhz : 50; }

static unsigned uncapped_sm_clock_mhz(const Gpu *gpu) {
    if (gpu->forced_mhz) return gpu->forced_mhz;
    if (!gpu->applied.max_mhz) return gpu->busy ? MAX_MHZ : MIN_MHZ;
    int asked = gpu->busy ? gpu->applied.max_mhz : gpu->applied.min_mhz;
    if (asked > MAX_MHZ) asked = MAX_MHZ;
    int mhz = MIN_MHZ + (asked - MIN_MHZ) / STEP_MHZ * STEP_MHZ - (int)gpu->clamp_steps * STEP_MHZ;
    return mhz > MIN_MHZ ? mhz : MIN_MHZ;
}

static unsigned sm_clock_mhz(const Gpu *gpu) {
    unsigned mhz = uncapped_sm_clock_mhz(gpu);
    while (mhz > MIN_MHZ && power_w(mhz, gpu->busy) * 1000 > gpu->power_limit_mw) mhz -= STEP_MHZ;
    return mhz;
}

static double gpu_power_w(const Gpu *gpu) { return power_w(sm_clock_mhz(gpu), gpu->busy); }

static uint64_t event_reasons(const Gpu *gpu) {
    uint64_t capped = sm_clock_mhz(gpu) < uncapped_sm_clock_mhz(gpu) ? POWER_CAP_REASON : 0;
    return gpu->event_reasons | capped | (gpu->busy ? 0 : IDLE_REASON);
}

static void integrate(Gpu *gpu, int64_t until_ns) {
    if (until_ns <= gpu->t_ns) return;
    gpu->energy_j += gpu_power_w(gpu) * (until_ns - gpu->t_ns) * 1e-9;
    gpu->t_ns = until_ns;
}

static void integrate_changes(Gpu *gpu, int64_t until_ns) {
    if (gpu->change_ns && gpu->change_ns <= until_ns) {
        integrate(gpu, gpu->change_ns);
        gpu->applied = gpu->locked;
        gpu->change_ns = 0;
    }
    integrate(gpu, until_ns);
}

static void advance(Gpu *gpu) {
    int64_t now = now_ns(CLOCK_MONOTONIC);
    int64_t period_ns = gpu->counter_update_s * 1e9, update_ns = now - now % period_ns;
    if (update_ns > gpu->t_ns) {
        integrate_changes(gpu, update_ns);
        if (!gpu->counter_stuck) {
            gpu->counter_j = gpu->energy_j;
            gpu->counter_realtime_us = (now_ns(CLOCK_REALTIME) - (now - update_ns)) / 1000;
        }
    }
    integrate_changes(gpu, now);
}

/* --- one call: counted, delayed, failed as scripted, then done ------------------------------ */

typedef struct { int fd; unsigned index; Gpu gpu; } Call;

static Code count(Group *group) {
    group->calls++;
    if (!group->code || (group->after > 0 && group->after--)) return OK;
    Code code = group->code;
    if (group->times > 0 && !--group->times) group->code = 0;
    return code;
}

static Code count_groups(Gpu *gpu, unsigned group) {
    Code code = count(&gpu->groups[group & ~FIELD]);
    if (group & FIELD) return code;
    Code read_code = group < READ_GROUP ? count(&gpu->groups[READ_GROUP]) : OK;
    Code any_code = count(&gpu->groups[ANY_GROUP]);
    return code ? code : read_code ? read_code : any_code;
}

static double delay_s(const Gpu *gpu, unsigned group) {
    double own_s = gpu->groups[group & ~FIELD].delay_s;
    if (group & FIELD) return own_s;
    return own_s + gpu->groups[ANY_GROUP].delay_s
        + (group < READ_GROUP ? gpu->groups[READ_GROUP].delay_s : 0);
}

/* Sleep without the lock. It ends early when the script's delay is lowered meanwhile. */
static void wait_out(int fd, unsigned index, unsigned group) {
    int64_t called_ns = now_ns(CLOCK_MONOTONIC);
    Gpu gpu;
    while (pread(fd, &gpu, sizeof gpu, page_of(index)) == sizeof gpu
           && now_ns(CLOCK_MONOTONIC) - called_ns < delay_s(&gpu, group) * 1e9)
        nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
}

static int load(Call *call) {
    lock(call->fd);
    if (pread(call->fd, &call->gpu, sizeof call->gpu, page_of(call->index)) != sizeof call->gpu) return 0;
    advance(&call->gpu);
    return 1;
}

static void store(Call *call) {
    if (pwrite(call->fd, &call->gpu, sizeof call->gpu, page_of(call->index)) < 0) abort();
}

static Code end(Call *call, Code code) {
    if (call->fd < 0) return code;
    store(call);
    unlock_and_close(call->fd);
    return code;
}

/* On OK the lock is held and call->gpu is up to date until end(); else nothing is held. */
static Code begin(Call *call, Device device, unsigned group) {
    Header header;
    Code code = GPU_IS_LOST;
    call->fd = -1;
    strcpy(call->gpu.uuid, "-");
    if (!init_count) return UNINITIALIZED;
    call->index = (unsigned)((char *)device - (char *)devices);
    if (!device || call->index >= MAX_GPUS) return INVALID_ARGUMENT;
    if ((call->fd = open_state(&header)) < 0) return GPU_IS_LOST;
    if (call->index < header.gpus && load(call)) {
        code = count_groups(&call->gpu, group);
        store(call);
        if (delay_s(&call->gpu, group) > 0) {
            flock(call->fd, LOCK_UN);
            wait_out(call->fd, call->index, group);
            if (!load(call)) code = GPU_IS_LOST;
        }
    }
    if (code) {
        unlock_and_close(call->fd);
        call->fd = -1;
    }
    return code;
}

/* A setter's line in the log, in the order of the setters' effects: written before the unlock. It
   begins with a line break as well, because a kill may tear the line before it. */
static Code end_setter(Call *call, Code code, const char *function, const char *arguments) {
    char path[PATH_MAX], line[256];
    snprintf(path, sizeof path, "%s.log", getenv("AGFT_FAKE_NVML") ? getenv("AGFT_FAKE_NVML") : "");
    if (call->fd >= 0) store(call);
    int length = snprintf(line, sizeof line, "\n%lld %d %s %s %s %d\n", (long long)now_ns(CLOCK_MONOTONIC),
                          getpid(), function, call->gpu.uuid, arguments, code);
    int log = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (log >= 0 && write(log, line, length) < length) abort();
    if (log >= 0) close(log);
    return end(call, code);
}

/* --- library and system -------------------------------------------------------------------- */

#define ALIAS(name, of) Code name() __attribute__((alias(#of)))

Code nvmlInitWithFlags(unsigned flags) {
    Header header;
    int fd = open_state(&header);
    (void)flags;
    if (fd < 0) return DRIVER_NOT_LOADED;
    Code code = count(&header.init);
    if (pwrite(fd, &header, sizeof header, 0) < 0) abort();
    flock(fd, LOCK_UN);
    int64_t called_ns = now_ns(CLOCK_MONOTONIC);
    while (pread(fd, &header, sizeof header, 0) == sizeof header
           && now_ns(CLOCK_MONOTONIC) - called_ns < header.init.delay_s * 1e9)
        nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
    close(fd);
    if (!code) __atomic_add_fetch(&init_count, 1, __ATOMIC_SEQ_CST);
    return code;
}

Code nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ALIAS(nvmlInit, nvmlInit_v2);

Code nvmlShutdown(void) {
    if (!init_count) return UNINITIALIZED;
    __atomic_sub_fetch(&init_count, 1, __ATOMIC_SEQ_CST);
    return OK;
}

const char *nvmlErrorString(Code code) {
    static const char *const names[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions",
        "Already Initialized", "Not Found", "Insufficient Size", "Insufficient External Power",
        "Driver Not Loaded", "Timeout", "Interrupt Request Issue", "NVML Shared Library Not Found",
        "Function Not Found", "Corrupted infoROM", "GPU is lost", "GPU requires reset",
        "GPU access blocked by the operating system", "Driver/library version mismatch",
        "In use by another client", "Insufficient memory", "No data",
        "vGPU ECC mode not supported", "Insufficient resources", "Frequency not supported",
        "Argument version mismatch", "Deprecated", "System is not ready", "GPU not found",
        "Invalid state", "Reset type not supported",
    };
    return (unsigned)code < sizeof names / sizeof *names ? names[code] : "Unknown Error";
}

static Code put_text(const char *text, char *out, unsigned size) {
    if (!out) return INVALID_ARGUMENT;
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

#ifdef OLD_DRIVER
#define DRIVER "470.42.01"
#define CUDA 11040
#else
#define DRIVER "550.54.15"
#define CUDA 12040
#endif

Code nvmlSystemGetDriverVersion(char *out, unsigned size) {
    return init_count ? put_text(DRIVER, out, size) : UNINITIALIZED;
}

Code nvmlSystemGetNVMLVersion(char *out, unsigned size) { return put_text("12." DRIVER, out, size); }

Code nvmlSystemGetCudaDriverVersion_v2(int *out) {
    if (!out) return INVALID_ARGUMENT;
    *out = CUDA;
    return OK;
}
ALIAS(nvmlSystemGetCudaDriverVersion, nvmlSystemGetCudaDriverVersion_v2);

/* --- finding GPUs -------------------------------------------------------------------------- */

Code nvmlDeviceGetCount_v2(unsigned *out) {
    Header header;
    int fd;
    if (!init_count) return UNINITIALIZED;
    if (!out) return INVALID_ARGUMENT;
    if ((fd = open_state(&header)) < 0) return GPU_IS_LOST;
    unlock_and_close(fd);
    *out = header.gpus;
    return OK;
}
ALIAS(nvmlDeviceGetCount, nvmlDeviceGetCount_v2);

Code nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *out) {
    Call call;
    unsigned gpus;
    Code code = nvmlDeviceGetCount_v2(&gpus);
    if (code) return code;
    if (!out || index >= gpus) return INVALID_ARGUMENT;
    if (!(code = begin(&call, (Device)&devices[index], HANDLE))) *out = (Device)&devices[index];
    return end(&call, code);
}
ALIAS(nvmlDeviceGetHandleByIndex, nvmlDeviceGetHandleByIndex_v2);

static Code find(const char *text, size_t offset, size_t skip, Device *out) {
    Header header;
    Gpu gpu;
    int fd;
    if (!init_count) return UNINITIALIZED;
    if (!text || !out) return INVALID_ARGUMENT;
    if ((fd = open_state(&header)) < 0) return GPU_IS_LOST;
    unsigned index = 0;
    while (index < header.gpus && pread(fd, &gpu, sizeof gpu, page_of(index)) == sizeof gpu
           && strcasecmp((char *)&gpu + offset + skip, text))
        index++;
    unlock_and_close(fd);
    return index < header.gpus ? nvmlDeviceGetHandleByIndex_v2(index, out) : NOT_FOUND;
}

Code nvmlDeviceGetHandleByUUID(const char *uuid, Device *out) {
    return find(uuid, offsetof(Gpu, uuid), 0, out);
}

/* "00000000:17:00.0" or, as in version 1, "0000:17:00.0" */
Code nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device *out) {
    size_t skip = bus_id && strlen(bus_id) == strlen("0000:17:00.0") ? 4 : 0;
    return find(bus_id, offsetof(Gpu, bus_id), skip, out);
}
ALIAS(nvmlDeviceGetHandleByPciBusId, nvmlDeviceGetHandleByPciBusId_v2);

/* --- reads --------------------------------------------------------------------------------- */

#define READ(name, group, parameters, condition, action)                    \
    Code name parameters {                                                  \
        Call call;                                                          \
        Code code = begin(&call, device, group);                            \
        if (!code && !(condition)) code = end(&call, INVALID_ARGUMENT);     \
        if (code) return code;                                              \
        const Gpu *gpu = &call.gpu;                                         \
        (void)gpu;                                                          \
        action;                                                             \
        return end(&call, code);                                            \
    }
#define READ_VALUE(name, group, type, value) \
    READ(name, group, (Device device, type *out), out, *out = (value))

READ(nvmlDeviceGetUUID, INFO, (Device device, char *out, unsigned size), out,
     code = put_text(gpu->uuid, out, size))
READ(nvmlDeviceGetName, INFO, (Device device, char *out, unsigned size), out,
     code = put_text(gpu->name, out, size))
READ_VALUE(nvmlDeviceGetIndex, INFO, unsigned, call.index)
READ_VALUE(nvmlDeviceGetMinorNumber, INFO, unsigned, call.index)
READ_VALUE(nvmlDeviceGetPersistenceMode, INFO, unsigned, gpu->persistence_mode)
READ_VALUE(nvmlDeviceGetVirtualizationMode, INFO, unsigned, gpu->virtualization_mode)
READ_VALUE(nvmlDeviceGetPerformanceState, INFO, unsigned, gpu->busy ? 0 : 8)
READ_VALUE(nvmlDeviceGetPowerManagementLimit, INFO, unsigned, gpu->power_limit_mw)
READ_VALUE(nvmlDeviceGetEnforcedPowerLimit, INFO, unsigned, gpu->power_limit_mw)
READ_VALUE(nvmlDeviceGetPowerManagementDefaultLimit, INFO, unsigned, MAX_LIMIT_MW)
READ_VALUE(nvmlDeviceGetMaxMigDeviceCount, INFO, unsigned, gpu->mig_mode == 1 ? 7 : 0)
READ_VALUE(nvmlDeviceGetPowerUsage, POWER, unsigned, gpu_power_w(gpu) * 1000)
READ_VALUE(nvmlDeviceGetTotalEnergyConsumption, ENERGY, unsigned long long, gpu->counter_j * 1000)
READ_VALUE(nvmlDeviceGetCurrentClocksThrottleReasons, REASONS, unsigned long long, event_reasons(gpu))
#ifndef OLD_DRIVER
READ_VALUE(nvmlDeviceGetCurrentClocksEventReasons, REASONS, unsigned long long, event_reasons(gpu))
#endif

READ(nvmlDeviceGetPowerManagementLimitConstraints, INFO, (Device device, unsigned *min, unsigned *max),
     min && max, (*min = MIN_LIMIT_MW, *max = MAX_LIMIT_MW))
READ(nvmlDeviceGetCudaComputeCapability, INFO, (Device device, int *major, int *minor),
     major && minor, (*major = 9, *minor = 0))
READ(nvmlDeviceGetMigDeviceHandleByIndex, INFO, (Device device, unsigned index, Device *out),
     out && index < 7, code = NOT_FOUND)
READ(nvmlDeviceGetMigMode, INFO, (Device device, unsigned *current, unsigned *pending),
     current && pending,
     if (gpu->mig_mode < 0) code = NOT_SUPPORTED;
     else (*current = gpu->mig_mode, *pending = gpu->mig_pending))

enum { SENSOR_GPU = 0, CLOCK_MEMORY = 2, CLOCK_TYPES = 4 };
READ(nvmlDeviceGetClockInfo, CLOCK, (Device device, unsigned type, unsigned *out),
     out && type < CLOCK_TYPES, *out = type == CLOCK_MEMORY ? MEMORY_MHZ : sm_clock_mhz(gpu))
READ(nvmlDeviceGetMaxClockInfo, INFO, (Device device, unsigned type, unsigned *out),
     out && type < CLOCK_TYPES, *out = type == CLOCK_MEMORY ? MEMORY_MHZ : MAX_MHZ)
READ(nvmlDeviceGetTemperature, INFO, (Device device, unsigned sensor, unsigned *out),
     out && sensor == SENSOR_GPU, *out = gpu->temperature_c)
#ifndef OLD_DRIVER
typedef struct { unsigned version, sensor; int temperature_c; } Temperature;
READ(nvmlDeviceGetTemperatureV, INFO, (Device device, Temperature *out), out && out->sensor == SENSOR_GPU,
     out->temperature_c = gpu->temperature_c)
#endif

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} Pci;
READ(nvmlDeviceGetPciInfo_v3, INFO, (Device device, Pci *out), out,
     *out = ((Pci){ .device_id = 0x233010de, .subsystem_id = 0x16c110de });
     sscanf(gpu->bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device);
     strcpy(out->bus_id_legacy, gpu->bus_id + 4);
     strcpy(out->bus_id, gpu->bus_id))

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
static const unsigned long long GIB = 1ULL << 30;
READ(nvmlDeviceGetMemoryInfo, INFO, (Device device, Memory *out), out,
     *out = ((Memory){ 80 * GIB, 79 * GIB, GIB }))
READ(nvmlDeviceGetMemoryInfo_v2, INFO, (Device device, Memory2 *out), out,
     if (out->version != (sizeof *out | 2u << 24)) code = ARGUMENT_VERSION_MISMATCH;
     else *out = ((Memory2){ out->version, 80 * GIB, GIB, 78 * GIB, GIB }))

typedef struct { unsigned gpu, memory; } Utilization;
READ(nvmlDeviceGetUtilizationRates, INFO, (Device device, Utilization *out), out,
     (out->gpu = gpu->busy * 100, out->memory = gpu->busy * 50))

READ(nvmlDeviceGetComputeRunningProcesses_v3, INFO, (Device device, unsigned *count, void *out),
     count, (*count = 0, (void)out))
ALIAS(nvmlDeviceGetComputeRunningProcesses_v2, nvmlDeviceGetComputeRunningProcesses_v3);
ALIAS(nvmlDeviceGetComputeRunningProcesses, nvmlDeviceGetComputeRunningProcesses_v3);
ALIAS(nvmlDeviceGetGraphicsRunningProcesses_v3, nvmlDeviceGetComputeRunningProcesses_v3);
ALIAS(nvmlDeviceGetGraphicsRunningProcesses_v2, nvmlDeviceGetComputeRunningProcesses_v3);
ALIAS(nvmlDeviceGetGraphicsRunningProcesses, nvmlDeviceGetComputeRunningProcesses_v3);

/* Descending, as the real library lists them. */
static Code put_clocks(unsigned highest_mhz, unsigned clocks, unsigned *size, unsigned *out_mhz) {
    unsigned room = *size;
    *size = clocks;
    if (room < clocks) return INSUFFICIENT_SIZE;
    if (!out_mhz) return INVALID_ARGUMENT;
    for (unsigned k = 0; k < clocks; k++) out_mhz[k] = highest_mhz - k * STEP_MHZ;
    return OK;
}

READ(nvmlDeviceGetSupportedMemoryClocks, INFO, (Device device, unsigned *size, unsigned *out_mhz),
     size, code = put_clocks(MEMORY_MHZ, 1, size, out_mhz))
READ(nvmlDeviceGetSupportedGraphicsClocks, INFO,
     (Device device, unsigned memory_mhz, unsigned *size, unsigned *out_mhz), size,
     if (memory_mhz != MEMORY_MHZ) code = NOT_FOUND;
     else code = put_clocks(MAX_MHZ, (MAX_MHZ - MIN_MHZ) / STEP_MHZ + 1, size, out_mhz))

/* READ_GROUP fails the call; ENERGY and POWER fail their fields of it. */
typedef struct {
    unsigned field, scope;
    int64_t timestamp_us, latency_us;
    unsigned type;
    Code code;
    union { unsigned unsigned_int; unsigned long long unsigned_long_long; } value;
} FieldValue;
enum { FIELD_ENERGY = 83, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186 };
enum { TYPE_UNSIGNED_INT = 1, TYPE_UNSIGNED_LONG_LONG = 3 };

static Code energy_field(Device device, FieldValue *out) {
    Call call;
    Code code = begin(&call, device, ENERGY | FIELD);
    if (code) return code;
    out->type = TYPE_UNSIGNED_LONG_LONG;
    out->value.unsigned_long_long = call.gpu.counter_j * 1000;
    out->timestamp_us = call.gpu.counter_realtime_us;
    return end(&call, OK);
}

#ifndef OLD_DRIVER
static Code power_field(Device device, FieldValue *out) {
    Call call;
    Code code = begin(&call, device, POWER | FIELD);
    if (code) return code;
    out->type = TYPE_UNSIGNED_INT;
    out->value.unsigned_int = gpu_power_w(&call.gpu) * 1000;
    out->timestamp_us = now_ns(CLOCK_REALTIME) / 1000;
    return end(&call, OK);
}
#endif

static Code field(Device device, FieldValue *out) {
    out->timestamp_us = out->latency_us = 0;
    if (out->field == FIELD_ENERGY) return energy_field(device, out);
#ifndef OLD_DRIVER
    if (out->field == FIELD_POWER_AVERAGE || out->field == FIELD_POWER_INSTANT)
        return power_field(device, out);
#endif
    return NOT_SUPPORTED;
}

Code nvmlDeviceGetFieldValues(Device device, int fields, FieldValue *values) {
    Call call;
    Code code = begin(&call, device, READ_GROUP);
    if (!code && (fields < 1 || !values)) code = end(&call, INVALID_ARGUMENT);
    if (code) return code;
    end(&call, OK);
    for (int k = 0; k < fields; k++) values[k].code = field(device, &values[k]);
    return OK;
}

/* --- setters ------------------------------------------------------------------------------- */

static void change(Gpu *gpu, unsigned min_mhz, unsigned max_mhz) {
    gpu->locked = (Range){ min_mhz, max_mhz };
    gpu->change_ns = gpu->t_ns + gpu->settle_s * 1e9;
}

Code nvmlDeviceSetGpuLockedClocks(Device device, unsigned min_mhz, unsigned max_mhz) {
    char arguments[32];
    Call call;
    Code code = begin(&call, device, SET);
    if (!code && (!max_mhz || min_mhz > max_mhz || max_mhz >= SYMBOLIC_CLOCKS)) code = INVALID_ARGUMENT;
    if (!code) change(&call.gpu, min_mhz, max_mhz);
    snprintf(arguments, sizeof arguments, "%u,%u", min_mhz, max_mhz);
    return end_setter(&call, code, __func__, arguments);
}

Code nvmlDeviceResetGpuLockedClocks(Device device) {
    Call call;
    Code code = begin(&call, device, RESET);
    if (!code) change(&call.gpu, 0, 0);
    return end_setter(&call, code, __func__, "-");
}

Code nvmlDeviceSetPowerManagementLimit(Device device, unsigned limit_mw) {
    char arguments[32];
    Call call;
    Code code = begin(&call, device, SET);
    if (!code && (limit_mw < MIN_LIMIT_MW || limit_mw > MAX_LIMIT_MW)) code = INVALID_ARGUMENT;
    if (!code) call.gpu.power_limit_mw = limit_mw;
    snprintf(arguments, sizeof arguments, "%u", limit_mw);
    return end_setter(&call, code, __func__, arguments);
}

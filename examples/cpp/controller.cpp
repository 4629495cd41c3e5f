// Drives the pendulum rig by a bundle's policy.h and the messages of ctrlrl/deploy/wire.py, over UDP, without Python.
//
//   c++ -std=c++11 -O2 -Wall -Wextra -Werror -I bundles/pendulum -o controller examples/cpp/controller.cpp
//   ./controller 127.0.0.1:7001 [--ticks N] [--max-age SECONDS] [--log FILE]
//
// Phases: wait for states that are to be believed, commanding the safe action; run, the policy; stop, the safe action
// at the end; fault, the safe action until the program is interrupted. Nothing is allocated, and nothing is written but
// the fault, from the first tick to the last. Exit status: 0 it stopped as it was asked to, 1 after a fault, 2 refused.

#define POLICY_GOLDENS  // for policy_check
#include "policy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

// What the bundle's manifest.json says; for another task these are to be written anew, and `observe` with them.
constexpr char ROBOT[] = "pendulum";  // robot
constexpr char JOINT[] = "hinge";     // action.joints, and the joints of all terms
constexpr char UNIT[] = "rad";        // joints[0].unit; it has neither lower nor upper
constexpr double PERIOD = 0.02;       // s, control_dt
constexpr float LOW = -1.0f;          // action.low
constexpr float HIGH = 1.0f;          // action.high
constexpr double SCALE = 0.25;        // N m, action.scale, of the kind "joint effort": effort = scale * action
constexpr double MAX_EFFORT = 0.25;   // N m, joints[0].max_effort
constexpr double TOLERANCE = 1e-5;    // network.tolerance
static_assert(sizeof(policy_input) == 4 * sizeof(float) && sizeof(policy_output) == sizeof(float),
              "policy.h is not of the pendulum: it takes 4 numbers (sine, cosine, speed, last action) and gives 1");

// What ctrlrl/deploy/wire.py says.
constexpr int HELLO = 1, DESCRIPTION = 2, STATE = 3, COMMAND = 4;
constexpr int SAFE = 0, DRIVE = 1, HELD = 2;
constexpr size_t HEADER = 32, ECHO = 32, DIGEST = 8, LARGEST_DESCRIPTION = 32768;
constexpr size_t STATE_SIZE = HEADER + 4 + 2 * 8;        // episode; position, velocity
constexpr size_t COMMAND_SIZE = HEADER + 4 + 8 + 3 * 8;  // episode, origin; target, kp, kd

// What ctrlrl/deploy/controller.py and safety.py do.
constexpr double CONNECT = 10.0;   // s in which the robot must answer
constexpr int HELLO_EVERY = 100;   // ms
constexpr double PATIENCE = 5.0;   // s in which states that are to be believed must come
constexpr int64_t SETTLE = 25;     // ticks of these before anything moves
constexpr int64_t LINGER = 15;     // ticks of the safe action at the end
constexpr double DRIFT = 2e-4;     // by which the robot's clock may go differently from ours
constexpr int AT_ONCE = 1000;      // messages looked at in one tick: a flood must not stop the loop

volatile sig_atomic_t asked = 0;
void ask(int) { asked = 1; }

// --- numbers, as messages have them: little-endian on any processor --------------------------------------------------

void put(unsigned char *at, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) at[i] = static_cast<unsigned char>(value >> (8 * i));
}

uint64_t get(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(at[i]) << (8 * i);
    return value;
}

void put_number(unsigned char *at, double value) {
    static_assert(sizeof value == 8, "double must be IEEE 754's of 64 bits");
    uint64_t bits;
    memcpy(&bits, &value, 8);
    put(at, bits, 8);
}

double get_number(const unsigned char *at) {
    const uint64_t bits = get(at, 8);
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

// --- time: ns of a clock that never goes back ------------------------------------------------------------------------

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

double now() { return 1e-9 * static_cast<double>(now_ns()); }

void sleep_until(int64_t moment) {
    timespec t;
    t.tv_sec = static_cast<time_t>(moment / 1000000000);
    t.tv_nsec = static_cast<long>(moment % 1000000000);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) == EINTR) {
    }
}

// --- the description: whether it is the robot that the policy is for -------------------------------------------------

// Reads the JSON of wire.RobotDescription as far as one joint without limits needs it, and compares on the way. What it
// does not know is refused: other members, members that stand twice, escapes in names.
class Description {
public:
    char wrong[200];  // what is refused; empty: it is only no JSON of this kind

    Description(const unsigned char *text, size_t size)
        : at_(reinterpret_cast<const char *>(text)), end_(at_ + size) {
        wrong[0] = 0;
    }

    bool fits() {
        const unsigned seen = members([this](const char *name) -> unsigned {
            if (!strcmp(name, "name")) return word("the robot", ROBOT) ? 1 : 0;
            if (!strcmp(name, "control")) return word("what it takes", "effort") ? 2 : 0;
            if (!strcmp(name, "joints")) return joints() ? 4 : 0;
            if (!strcmp(name, "rate")) return at_least("rate, Hz", 1 / PERIOD) ? 8 : 0;
            if (!strcmp(name, "watchdog")) return at_least("watchdog, s", PERIOD) ? 16 : 0;
            if (!strcmp(name, "measures")) return nothing() ? 32 : 0;
            return 0;
        });
        space();
        return (seen & 31) == 31 && at_ == end_;
    }

private:
    const char *at_, *end_;

    bool joints() {
        const bool first = is('[') && (members([this](const char *name) -> unsigned {
            if (!strcmp(name, "name")) return word("the joint", JOINT) ? 1 : 0;
            if (!strcmp(name, "max_effort")) return effort() ? 2 : 0;
            if (!strcmp(name, "unit")) return word("the joint's unit", UNIT) ? 4 : 0;
            if (!strcmp(name, "lower")) return null() || no("the joint has a lower limit") ? 8 : 0;
            if (!strcmp(name, "upper")) return null() || no("the joint has an upper limit") ? 16 : 0;
            return 0;
        }) & 3) == 3;
        return first && (is(']') || no("it has more than one joint"));
    }

    // The members of an object: `member` reads one, by name, and gives a bit of its own, 0 for what is refused.
    template <typename Member>
    unsigned members(Member member) {
        unsigned seen = 0;
        char name[64];
        if (!is('{')) return 0;
        do {
            if (!string(name) || !is(':')) return 0;
            const unsigned bit = member(name);
            if (bit == 0 || (seen & bit)) return 0;
            seen |= bit;
        } while (is(','));
        return is('}') ? seen : 0;
    }

    bool nothing() { return (is('{') && is('}')) || no("it measures what is not known here"); }

    bool word(const char *what, const char *wanted) {
        char found[64];
        if (!string(found)) return false;
        return !strcmp(found, wanted) || no("%s is '%s', and the policy is for '%s'", what, found, wanted);
    }

    bool effort() {
        double found;
        if (!number(&found)) return false;
        return std::fabs(found - MAX_EFFORT) <= 1e-6 * MAX_EFFORT ||
               no("the joint's largest effort is %g, and the policy is for %g", found, MAX_EFFORT);
    }

    bool at_least(const char *what, double least) {
        double found;
        if (!number(&found)) return false;
        return found >= least || no("%s: %g, and the policy needs %g at least", what, found, least);
    }

    void space() {
        while (at_ < end_ && memchr(" \t\r\n", *at_, 4)) ++at_;
    }

    bool is(char c) {
        space();
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }

    bool null() {
        space();
        if (end_ - at_ < 4 || memcmp(at_, "null", 4)) return false;
        at_ += 4;
        return true;
    }

    bool string(char (&out)[64]) {
        if (!is('"')) return false;
        for (size_t i = 0; at_ < end_ && i < sizeof out; ++i) {
            const char c = *at_++;
            if (c == '"') {
                out[i] = 0;
                return true;
            }
            if (c < ' ' || c > '~' || c == '\\') return false;  // names of ours are plain, and are printed
            out[i] = c;
        }
        return false;
    }

    bool number(double *out) {
        space();
        char text[40], *rest;
        size_t size = 0;
        while (at_ < end_ && size + 1 < sizeof text && memchr("+-.0123456789eE", *at_, 15)) text[size++] = *at_++;
        text[size] = 0;
        *out = strtod(text, &rest);
        return size > 0 && *rest == 0 && std::isfinite(*out);
    }

    bool no(const char *format, ...) __attribute__((format(printf, 2, 3))) {
        va_list values;
        va_start(values, format);
        vsnprintf(wrong, sizeof wrong, format, values);
        va_end(values);
        return false;
    }
};

// --- messages --------------------------------------------------------------------------------------------------------

struct State {
    uint64_t sequence;
    double time;  // s, of the robot's clock
    int mode;
    uint32_t episode;
    double position, velocity;
};

enum Dropped { SIZE, MAGIC, VERSION, KIND, OTHER, MODE, SEQUENCE, REASONS };
const char *const REASON[REASONS] = {"size", "magic", "version", "kind", "description", "mode", "sequence"};

// Messages to and from one robot. The socket is connected, so that the operating system drops what others send.
class Link {
public:
    uint64_t taken = 0, dropped[REASONS] = {}, lost = 0;  // `lost`: the operating system did not take them

    // Whether `address`, HOST:PORT in numbers, can be reached.
    bool open(const char *address) {
        char host[64];
        const char *colon = strrchr(address, ':');
        if (colon == nullptr || static_cast<size_t>(colon - address) >= sizeof host) return false;
        memcpy(host, address, static_cast<size_t>(colon - address));
        host[colon - address] = 0;
        char *rest;
        const long port = strtol(colon + 1, &rest, 10);
        sockaddr_in to = {};
        to.sin_family = AF_INET;
        to.sin_port = htons(static_cast<uint16_t>(port));
        if (*rest != 0 || port < 1 || port > 65535 || inet_pton(AF_INET, host, &to.sin_addr) != 1) return false;
        socket_ = socket(AF_INET, SOCK_DGRAM, 0);
        return socket_ >= 0 && connect(socket_, reinterpret_cast<sockaddr *>(&to), sizeof to) == 0;
    }

    // Say hello until the robot describes itself; where its JSON begins, or null, and its size.
    const unsigned char *greet(size_t *size) {
        unsigned char hello[HEADER + ECHO];
        FILE *random = fopen("/dev/urandom", "rb");  // on a microcontroller: any 32 bytes that nobody can guess
        const bool drawn = random != nullptr && fread(hello + HEADER, 1, ECHO, random) == ECHO;
        if (random != nullptr) fclose(random);
        const double end = now() + CONNECT;
        while (drawn && !asked && now() < end) {
            head(hello, HELLO, 0);
            send_it(hello, sizeof hello);
            const int64_t until = now_ns() + HELLO_EVERY * 1000000LL;
            for (int64_t left; (left = until - now_ns()) > 0;) {
                pollfd waiting = {socket_, POLLIN, 0};
                poll(&waiting, 1, static_cast<int>(left / 1000000) + 1);
                const ssize_t n = receive();
                if (n < 0 || !opened(n, DESCRIPTION)) continue;
                *size = static_cast<size_t>(n) - HEADER;
                if (*size < ECHO || *size > ECHO + LARGEST_DESCRIPTION)
                    ++dropped[SIZE];
                else if (memcmp(message_ + HEADER, hello + HEADER, ECHO))
                    ++dropped[OTHER];  // the answer to somebody else's hello
                else {
                    *size -= ECHO;
                    return message_ + HEADER + ECHO;
                }
            }
        }
        return nullptr;
    }

    // Whether a newer state has come; the newest one by its sequence number. One that came twice, or was overtaken, is
    // dropped, and so is one of another size or description.
    bool newest(State *state) {
        bool fresh = false;
        for (int i = 0; i < AT_ONCE; ++i) {
            const ssize_t n = receive();
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
            if (n < 0 || !opened(n, STATE)) continue;
            const unsigned char *m = message_;
            const uint64_t sequence = get(m + 8, 8);
            // The digest is that of the first state, which comes from whoever described itself; all later ones must
            // have the same. It would be the first 8 bytes of the SHA-256 of the description.
            if (n != static_cast<ssize_t>(STATE_SIZE))
                ++dropped[SIZE];
            else if (known_ && memcmp(m + 24, digest_, DIGEST))
                ++dropped[OTHER];
            else if (m[6] > HELD)
                ++dropped[MODE];
            else if (known_ && sequence <= newest_)
                ++dropped[SEQUENCE];
            else {
                memcpy(digest_, m + 24, DIGEST);
                known_ = fresh = true;
                ++taken;
                newest_ = state->sequence = sequence;
                state->time = 1e-9 * static_cast<double>(static_cast<int64_t>(get(m + 16, 8)));
                state->mode = m[6];
                state->episode = static_cast<uint32_t>(get(m + HEADER, 4));
                state->position = get_number(m + HEADER + 4);
                state->velocity = get_number(m + HEADER + 12);
            }
        }
        return fresh;
    }

    // Whether it could be sent. The effort, computed from `state`; before the first state the robot's digest is not
    // known, and nothing moves.
    bool command(int mode, const State &state, double effort) {
        if (!known_) return false;
        unsigned char message[COMMAND_SIZE];
        head(message, COMMAND, mode);
        put(message + HEADER, state.episode, 4);
        put(message + HEADER + 4, state.sequence, 8);
        put_number(message + HEADER + 12, effort);
        put_number(message + HEADER + 20, 0.0);  // kp and kd: of robots that take positions
        put_number(message + HEADER + 28, 0.0);
        return send_it(message, sizeof message);
    }

private:
    int socket_ = -1;
    uint64_t sent_ = 0, newest_ = 0;
    bool known_ = false;
    unsigned char digest_[DIGEST] = {};
    unsigned char message_[HEADER + ECHO + LARGEST_DESCRIPTION + 1];

    void head(unsigned char *at, int kind, int mode) {
        memcpy(at, "CTRL", 4);
        at[4] = 1;  // version
        at[5] = static_cast<unsigned char>(kind);
        at[6] = static_cast<unsigned char>(mode);
        at[7] = 0;
        put(at + 8, ++sent_, 8);
        put(at + 16, static_cast<uint64_t>(now_ns()), 8);
        memcpy(at + 24, digest_, DIGEST);  // zeros in a hello
    }

    bool send_it(const unsigned char *message, size_t size) {
        const bool gone = send(socket_, message, size, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(size);
        lost += !gone;
        return gone;
    }

    // Bytes of a message, at most those of `message_`; -1: errno says why there is none.
    ssize_t receive() { return recv(socket_, message_, sizeof message_, MSG_DONTWAIT); }

    // Whether the message of `size` bytes is one of this kind.
    bool opened(ssize_t size, int kind) {
        const unsigned char *m = message_;
        if (size < static_cast<ssize_t>(HEADER)) return ++dropped[SIZE], false;
        if (memcmp(m, "CTRL", 4) || m[7] != 0) return ++dropped[MAGIC], false;
        if (m[4] != 1) return ++dropped[VERSION], false;
        if (m[5] != kind) return ++dropped[KIND], false;
        return true;
    }
};

// --- the controller --------------------------------------------------------------------------------------------------

struct Tick {
    uint64_t sequence;
    uint32_t episode;
    double position, velocity;
    float action;
    double effort;
};

policy_memory memory;
policy_input in;
policy_output out;
Tick ticks[3000];  // the first minute, for --log
Link robot;        // its buffer is large for a stack

class Controller {
public:
    explicit Controller(double max_age, int64_t most) : max_age_(max_age), most_(most) {}

    int64_t count = 0, driven = 0, safe = 0, late = 0, missed = 0, episodes = 0, clipped = 0;
    double worst = 0.0;  // s, by which a tick began late
    char fault[160] = "";

    // One tick after the other, at absolute deadlines; what was missed is not made up for.
    void run() {
        const int64_t period = static_cast<int64_t>(PERIOD * 1e9 + 0.5), start = now_ns() + period;
        int64_t number = 0, ending = 0;
        for (;;) {
            const int64_t due = start + number * period;
            sleep_until(due);
            const double lateness = 1e-9 * static_cast<double>(now_ns() - due);
            worst = std::fmax(worst, lateness);
            late += lateness > PERIOD / 2;
            if (phase_ < STOP && (asked || (most_ > 0 && driven >= most_))) phase_ = STOP;
            tick();
            if (phase_ == STOP && ++ending > LINGER) return;
            if (phase_ == FAULT && asked) return;
            const int64_t passed = (now_ns() - start) / period, following = passed > number ? passed : number + 1;
            missed += following - number - 1;
            number = following;
        }
    }

private:
    enum Phase { WAIT, RUN, STOP, FAULT };

    const double max_age_;
    const int64_t most_;
    Phase phase_ = WAIT;
    State state_ = {};
    int64_t believed_ = 0;
    bool begun_ = false;
    uint32_t episode_ = 0;
    float last_action_ = 0.0f;
    bool known_ = false;                             // whether there was a state, so that these are known:
    double last_ = 0.0, seen_ = 0.0, offset_ = 0.0;  // s: of the newest state by the robot's clock, by ours; difference

    void tick() {
        ++count;
        const bool fresh = robot.newest(&state_);  // after a fault, too: commands say which episode they are for
        if (phase_ < STOP) {
            if (check(fresh) && settled() && act()) return;
        }
        safe += robot.command(SAFE, state_, 0.0);
    }

    bool fail(const char *format, ...) __attribute__((format(printf, 2, 3))) {
        va_list values;
        va_start(values, format);
        vsnprintf(fault, sizeof fault, format, values);
        va_end(values);
        phase_ = FAULT;
        fprintf(stderr, "fault: %s\n", fault);
        return false;
    }

    // Whether what was measured is to be believed.
    bool check(bool fresh) {
        if (fresh) {
            if (!take(state_.time, now())) return false;
            ++believed_;
        }
        if ((fresh || phase_ == RUN) && !young()) return false;
        if (!std::isfinite(state_.position) || !std::isfinite(state_.velocity))
            return fail("not finite: %s is at %g, moving %g", JOINT, state_.position, state_.velocity);
        if (phase_ == RUN && begun_ && state_.mode == HELD && state_.episode == episode_)
            return fail("robot: it holds itself safe");
        return true;
    }

    // The difference of both clocks at the state that came quickest is what they differ by: what another one came later
    // than that is its age. As ctrlrl.deploy.safety.Clock.
    bool take(double time, double here) {
        if (known_ && !(time > last_)) return fail("clock: the robot's went back by %g s", last_ - time);
        const double offset = here - time;
        if (known_ && offset < offset_ - max_age_)
            return fail("clock: the robot's jumped ahead by %g s", offset_ - offset);
        offset_ = known_ ? std::fmin(offset, offset_ + DRIFT * (here - seen_)) : offset;
        known_ = true;
        last_ = time;
        seen_ = here;
        return true;
    }

    bool young() {
        const double age = now() - last_ - offset_;
        return age <= max_age_ || fail("age: the newest state is %g s old, allowed are %g", age, max_age_);
    }

    // Whether the policy may drive.
    bool settled() {
        if (phase_ == WAIT && believed_ >= 2 && count > SETTLE) phase_ = RUN;
        if (phase_ == WAIT && static_cast<double>(count) * PERIOD > PATIENCE)
            return fail("no state: none within %g s", PATIENCE);
        return phase_ == RUN;
    }

    // What the network sees: the terms of the manifest's observation, in its order, computed in float64.
    void observe() {
        in.policy[0] = static_cast<float>(std::sin(state_.position));  // angle, "joint direction": sine, then cosine
        in.policy[1] = static_cast<float>(std::cos(state_.position));
        in.policy[2] = static_cast<float>(state_.velocity);  // speed, "joint velocity"
        in.policy[3] = last_action_;                          // last action, after the clip; 0 when an episode begins
    }

    // Whether the policy's command was sent.
    bool act() {
        if (!begun_ || state_.episode != episode_) {
            begun_ = true;
            episode_ = state_.episode;
            last_action_ = 0.0f;  // and where a policy has a memory: zeros
            ++episodes;
        }
        observe();
        policy_run(&in, &out, &memory);
        const float wanted = out.action[0];
        if (!std::isfinite(wanted)) return fail("action: the policy gave %g", static_cast<double>(wanted));
        last_action_ = std::fmin(std::fmax(wanted, LOW), HIGH);
        clipped += wanted != last_action_;
        const double effort = std::fmin(std::fmax(SCALE * static_cast<double>(last_action_), -MAX_EFFORT), MAX_EFFORT);
        if (!young()) return false;  // again: computing took its time
        if (driven < static_cast<int64_t>(sizeof ticks / sizeof *ticks))
            ticks[driven] = {state_.sequence, state_.episode, state_.position, state_.velocity, last_action_, effort};
        ++driven;
        robot.command(DRIVE, state_, effort);
        return true;
    }
};

int refuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
int refuse(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fputc('\n', stderr);
    return 2;
}

}  // namespace

int main(int count, char **given) {
    const char *log_name = nullptr;
    double max_age = 2 * PERIOD, most = 0;
    bool right = count >= 2 && count % 2 == 0;
    for (int i = 2; right && i + 1 < count; i += 2) {
        char *rest = given[i + 1];
        if (!strcmp(given[i], "--log"))
            log_name = given[i + 1], rest = given[i + 1] + strlen(given[i + 1]);
        else if (!strcmp(given[i], "--max-age"))
            max_age = strtod(given[i + 1], &rest);
        else if (!strcmp(given[i], "--ticks"))
            most = strtod(given[i + 1], &rest);
        right = *given[i + 1] != 0 && *rest == 0;
    }
    if (!right || !(max_age > 0 && max_age <= 60) || !(most >= 0 && most <= 1e9))
        return refuse("usage: controller HOST:PORT [--ticks N] [--max-age SECONDS] [--log FILE]\n"
                      "  --ticks N          of the policy, after which it stops; by default when it is interrupted\n"
                      "  --max-age SECONDS  after which a state is too old, at most 60; by default %g\n"
                      "  --log FILE         write what was measured and done in the policy's first minute", 2 * PERIOD);

    const double off = static_cast<double>(policy_check(&memory));  // NaN is no number that is small enough
    if (!(off <= TOLERANCE))
        return refuse("the policy gives other numbers than when it was exported: off by %g", off);
    if (!robot.open(given[1]))
        return refuse("an address is HOST:PORT in numbers, such as 127.0.0.1:7001; got %s", given[1]);

    struct sigaction action = {};
    action.sa_handler = ask;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    size_t size = 0;
    const unsigned char *json = robot.greet(&size);
    if (json == nullptr)
        return refuse("no robot answers at %s within %g s: is it on, and is the address right?", given[1], CONNECT);
    Description description(json, size);
    if (!description.fits())
        return refuse("the policy is not for the robot at %s: %s", given[1],
                      *description.wrong ? description.wrong : "its description is not that of such a rig");

    Controller controller(max_age, static_cast<int64_t>(most));
    controller.run();

    printf("goldens: off by %g at most\n", off);
    printf("fault: %s\n", *controller.fault ? controller.fault : "none");
    printf("ticks: %" PRId64 "\n", controller.count);
    printf("driven: %" PRId64 "\n", controller.driven);
    printf("safe: %" PRId64 "\n", controller.safe);
    printf("episodes: %" PRId64 "\n", controller.episodes);
    printf("clipped: %" PRId64 "\n", controller.clipped);
    printf("late: %" PRId64 ", by %.3f ms at most\n", controller.late, 1e3 * controller.worst);
    printf("missed: %" PRId64 "\n", controller.missed);
    printf("states: %" PRIu64 "\n", robot.taken);
    for (int i = 0; i < REASONS; ++i) printf("dropped for their %s: %" PRIu64 "\n", REASON[i], robot.dropped[i]);
    printf("not sent: %" PRIu64 "\n", robot.lost);
    if (log_name != nullptr) {
        FILE *log = fopen(log_name, "w");
        if (log == nullptr) return refuse("cannot write %s: %s", log_name, strerror(errno));
        fprintf(log, "# sequence, episode, position rad, velocity rad/s, action, effort N m\n");
        for (int64_t i = 0; i < controller.driven && i < static_cast<int64_t>(sizeof ticks / sizeof *ticks); ++i) {
            const Tick &t = ticks[i];
            fprintf(log, "%" PRIu64 " %" PRIu32 " %.17g %.17g %.9g %.17g\n", t.sequence, t.episode, t.position,
                    t.velocity, static_cast<double>(t.action), t.effort);
        }
        if (fclose(log) != 0) return refuse("cannot write %s: %s", log_name, strerror(errno));
    }
    return *controller.fault ? 1 : 0;
}

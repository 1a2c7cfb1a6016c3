/* A light HTTP/1.1 server that stands in for a model's provider: one thread on one epoll.

       cc -O2 -Wall -o fakeserver fakeserver.c
       ./fakeserver FOLDER [LATENCY [GAP]]

   It prints the free port of 127.0.0.1 that it took, and ends when its standard input does.

       POST …/chat/completions    sends the file `chat`; with "stream": true, `chat_stream`
       POST …/messages            sends `messages` or `messages_stream`
       GET  /set?latency=50&gap=1 sets one or both, and all counts to 0
       GET  /counts               requests, connections accepted, most in flight, own CPU seconds

   The files in FOLDER are whole HTTP responses, as calling.py writes them. A stream is sent in one
   go or, if there is a gap, each of its events by itself. LATENCY, until the first byte, and GAP,
   between two events, are in milliseconds, and rounded up to whole ones. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* Bytes to send, and where each part of them ends that may be sent by itself. */
typedef struct { char *bytes; size_t *ends, parts; } Answer;

typedef struct Conn Conn;
struct Conn {
    int fd;
    bool full;             /* the socket took no more: epoll tells when it does */
    char *in;              /* what was read, and belongs to no request that was taken */
    size_t held, room;
    const Answer *answer;  /* what is being sent: the part that goes next, and all bytes so far */
    size_t part, sent;
    double due;            /* when it goes on, if it stands in a queue */
    Conn *before, *after;
};

enum { LATENCY, GAP };
static double waits[2];    /* in ms */
static Conn queues[2];     /* who waits for which: rings in the order of `due` */
static Answer chat, chat_stream, messages, messages_stream;
static long requests, accepted, in_flight, most;
static double cpu_before;
static int epoll;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec
        + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static Answer answer_in(const char *name) {
    FILE *file = fopen(name, "r");
    if (!file) perror(name), exit(1);
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    Answer answer = {malloc(size), malloc(size * sizeof(size_t)), 0};
    rewind(file);
    if (fread(answer.bytes, 1, size, file) != size) perror(name), exit(1);
    fclose(file);
    for (size_t i = 4; i < size; i++)  /* an event ends with an empty line, its chunk with CRLF */
        if (!memcmp(answer.bytes + i - 4, "\n\n\r\n", 4)) answer.ends[answer.parts++] = i;
    answer.ends[answer.parts++] = size;
    return answer;
}

static void watch(Conn *conn, int operation, bool full) {
    struct epoll_event event = {EPOLLIN | (full ? EPOLLOUT : 0), {.ptr = conn}};
    epoll_ctl(epoll, operation, conn->fd, &event);
    conn->full = full;
}

static void join(int which, Conn *conn) {
    Conn *queue = &queues[which];
    conn->due = now() + waits[which];
    conn->before = queue->before;
    conn->after = queue;
    queue->before->after = conn;
    queue->before = conn;
}

static void leave(Conn *conn) {
    if (conn->after) {
        conn->before->after = conn->after;
        conn->after->before = conn->before;
    }
    conn->before = conn->after = NULL;
}

static void drop(Conn *conn) {
    leave(conn);
    if (conn->answer) in_flight--;
    close(conn->fd);
    free(conn->in);
    free(conn);
}

/* From here on, a function that returns a bool says whether the connection is to be kept. */

static bool send_more(Conn *conn) {
    const Answer *answer = conn->answer;
    size_t last = answer->parts - 1, end = answer->ends[waits[GAP] > 0 ? conn->part : last];
    while (conn->sent < end) {
        ssize_t n = send(conn->fd, answer->bytes + conn->sent, end - conn->sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) {
            watch(conn, EPOLL_CTL_MOD, true);
            return true;
        }
        conn->sent += n;
    }
    if (conn->full) watch(conn, EPOLL_CTL_MOD, false);
    if (end < answer->ends[last]) {
        conn->part++;
        join(GAP, conn);
    } else {
        conn->answer = NULL;
        conn->part = conn->sent = 0;
        in_flight--;
    }
    return true;
}

/* Answers what is no provider's route. */
static bool control(Conn *conn, const char *path) {
    const char *latency = strstr(path, "latency="), *gap = strstr(path, "gap=");
    char body[200], text[400];
    snprintf(body, sizeof body,
             "{\"requests\": %ld, \"connections\": %ld, \"most\": %ld, \"cpu\": %.6f}",
             requests, accepted, most, cpu_seconds() - cpu_before);
    if (latency) waits[LATENCY] = atof(latency + 8);
    if (gap) waits[GAP] = atof(gap + 4);
    if (strstr(path, "/set")) {
        requests = accepted = 0;
        most = in_flight;
        cpu_before = cpu_seconds();
    }
    int size = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        "Content-Length: %zu\r\n\r\n%s", strlen(body), body);
    return send(conn->fd, text, size, MSG_NOSIGNAL) == size;
}

static bool streamed(const char *body, size_t size) {
    return memmem(body, size, "\"stream\":true", 13) || memmem(body, size, "\"stream\": true", 14);
}

/* The size of the first request if all of it is there, else 0; `body` is where its body starts. */
static size_t whole_request(const Conn *conn, size_t *body) {
    char *end = conn->held ? memmem(conn->in, conn->held, "\r\n\r\n", 4) : NULL;
    if (!end) return 0;
    size_t size = *body = end + 4 - conn->in;
    for (char *line = conn->in; (line = memchr(line, '\n', end - line)); ) {
        line++;
        if (!strncasecmp(line, "content-length:", 15)) size += strtoul(line + 15, NULL, 10);
    }
    return size <= conn->held ? size : 0;
}

/* Takes the requests that are there, one after the other. */
static bool serve(Conn *conn) {
    bool kept = true;
    size_t size, body;
    while (kept && !conn->answer && (size = whole_request(conn, &body))) {
        char *path = strpbrk(conn->in, " \r") + 1, *end = strpbrk(path, " \r");
        bool stream = streamed(conn->in + body, size - body);
        *end = 0;
        if (strstr(path, "/chat/completions")) conn->answer = stream ? &chat_stream : &chat;
        else if (strstr(path, "/messages")) conn->answer = stream ? &messages_stream : &messages;
        else kept = control(conn, path);
        conn->held -= size;
        memmove(conn->in, conn->in + size, conn->held);
        if (!conn->answer) continue;
        requests++;
        if (++in_flight > most) most = in_flight;
        if (waits[LATENCY] > 0) join(LATENCY, conn);
        else kept = send_more(conn);
    }
    return kept;
}

static bool receive(Conn *conn) {
    if (conn->room < conn->held + 2048) {
        conn->room = 2 * conn->room + 4096;
        conn->in = realloc(conn->in, conn->room);
    }
    ssize_t n = recv(conn->fd, conn->in + conn->held, conn->room - conn->held, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN;
    conn->held += n;
    return serve(conn);
}

static void accept_all(int listener) {
    int fd, on = 1;
    for (; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0; accepted++) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        Conn *conn = calloc(1, sizeof *conn);
        conn->fd = fd;
        watch(conn, EPOLL_CTL_ADD, false);
    }
}

/* Lets those go on whose time has come. How many ms there are until the next one, -1: for ever. */
static int next_due(void) {
    double first = 1e300, time = now();
    for (int which = LATENCY; which <= GAP; which++) {
        Conn *queue = &queues[which], *conn;
        while ((conn = queue->after) != queue && conn->due <= time) {
            leave(conn);
            if (!(send_more(conn) && serve(conn))) drop(conn);
        }
        if (conn != queue && conn->due < first) first = conn->due;
    }
    return first == 1e300 ? -1 : first <= time ? 0 : (int)(first - time) + 1;
}

static int listening(void) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (void *)&address, size) || listen(fd, 1 << 14)) perror("listen"), exit(1);
    getsockname(fd, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void start(int count, char **values) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (count < 2 || chdir(values[1])) fprintf(stderr, "which folder?\n"), exit(1);
    chat = answer_in("chat"), chat_stream = answer_in("chat_stream");
    messages = answer_in("messages"), messages_stream = answer_in("messages_stream");
    for (int which = LATENCY; which <= GAP; which++) {
        waits[which] = count > which + 2 ? atof(values[which + 2]) : 0;
        queues[which].before = queues[which].after = &queues[which];
    }
}

int main(int count, char **values) {
    start(count, values);
    char typed[100];
    struct epoll_event events[512];
    Conn listener = {.fd = listening()}, input = {.fd = 0};
    epoll = epoll_create1(0);
    watch(&listener, EPOLL_CTL_ADD, false), watch(&input, EPOLL_CTL_ADD, false);
    for (;;) {
        int n = epoll_wait(epoll, events, 512, next_due());
        for (int i = 0; i < n; i++) {
            Conn *conn = events[i].data.ptr;
            if (conn == &listener) accept_all(listener.fd);
            else if (conn == &input && read(0, typed, sizeof typed) <= 0) return 0;
            else if (conn == &input) continue;
            else if (conn->full && !(send_more(conn) && serve(conn))) drop(conn);
            else if (!receive(conn)) drop(conn);
        }
    }
}

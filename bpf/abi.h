/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The layouts that the packet path and the control plane share. This file is their only definition: Python takes them from
 * the compiled program. Sizes, enums and flags have their only definition in Python (xdplb/abi.py) and reach C by -D.
 *
 * Ids start at 1: an entry full of zeros refers to nothing.
 */
#ifndef XDPLB_ABI_H
#define XDPLB_ABI_H

#include "wire.h"

/* An IPv6 address as two words loaded from the wire; an IPv4 address is ::ffff:a.b.c.d. */
struct address {
	__u64 hi;
	__u64 lo;
};

/* `count` of the intervals from `first` on, sorted and disjoint. */
struct interval_range {
	__u32 first;
	__u32 count;
};

/*
 * What is known of one address: the services that listen on it, and the NAT backends that answer from it.
 * The table is a cuckoo hash with two buckets an address, a bucket being one cache line. It is kept twice:
 * the control plane fills the half that is not in use and then turns `directory`.
 */
struct address_entry {
	struct address address;
	struct interval_range services;
	struct interval_range replies;
};

struct address_bucket {
	struct address_entry entry[2];
};

/* (protocol << 16 | port) from `first` to `last`, both included, belongs to `target`: a service's or a backend's id. */
struct interval {
	__u32 first;
	__u32 last;
	__u32 target;
	__u32 pad;
};

struct service {
	struct address address;
	__u32 slots;                /* index of its first slot; written and read together with slot_mask as one word */
	__u32 slot_mask;            /* number of its slots, a power of two, less one */
	__u32 sequence;             /* index, among the slots, of its wrr sequence */
	__u32 sequence_length;      /* 0 where the scheduler needs none */
	struct address client_mask; /* which bits of a client's address take part in the flow hash */
	__u32 ports_mask; /* and which of the ports: none for source-hash, and where flows of a client stay together */
	__be16 port;      /* 0 where the service has several ports */
	__be16 gue_port;
	__u16 members;   /* number of its backends behind the sequence, each once */
	__u16 keep_idle; /* for how many idle ticks a flow is remembered at least */
	__u8 forward;
	__u8 flags;
	__u8 scheduler;
	__u8 pad;
};

/* One server of one service. Everything a packet needs to be sent there, in one cache line. */
struct backend {
	struct address address;
	struct address source; /* of encapsulated packets */
	__be32 source_spread;  /* the bits of the source's last word that take the flow hash */
	__u32 ifindex;
	__u8 macs[12]; /* destination and source, as they stand in the frame */
	__u32 service;
	__be16 port; /* 0: keep the packet's own */
	__u16 mtu;   /* of the way there; the largest IP packet */
	__u8 flags;
	__u8 pad;
	__u16 kernel_mtu; /* with BACKEND_BY_KERNEL: the same, and mtu may be 0, so that no packet passes as usual */
};

/* The way of encapsulated packets to one address: what they have for their source, and what routers reported of it. */
struct tunnel_way {
	struct address source;
	__be32 source_spread;
	__u32 mtu;  /* the largest outer packet, as reported last; 0: never */
	__u32 tick; /* when that was */
	__u32 pad;
};

/*
 * The way of health checks through a service's address to one backend, by their source port; and the way back: the interface
 * and MAC addresses that lead to their sockets (probe.h).
 */
struct probe_way {
	struct service service;
	struct backend backend;
	__u8 macs[12];
	__u32 ifindex;
};

/*
 * What a scheduler that counts knows of a backend. `active`: flows remembered that neither closed nor fell silent; it is the
 * number of the backend's words in the flow cache that have FLOW_COUNTED, from one atomic change to the next. `weight`: its
 * share of new flows, 0 for none; this half is the control plane's.
 */
struct load {
	__u32 active;
	__u32 weight;
};

/* Per CPU: a choice of a backend for a flow, on its way through the programs that make it (schedule.h). */
struct choice {
	__u64 key;
	__u32 service;
	__u32 backend; /* 0 until it is chosen */
	__u32 best;    /* of those that were looked at so far, and how many that is */
	__u32 seen;
};

/*
 * A slot that changed hands: until `deadline`, in ticks, packets of flows that nobody remembers belong to the backend that it
 * had before. Kept beside the slots, one each, and read only where the slot says so.
 */
struct transition {
	__u32 previous;
	__u32 deadline;
};

/* One cache line of remembered flows; flow_cache.h says what a word holds. A word of 0 is free. */
struct flow_set {
	__u64 flow[8];
};

/*
 * The SYNs of a flow whose slot is in transition (syn_record.h): one cache line. `tag` is the flow's key with the rest of what
 * is known upon it, so that two CPUs that write at once leave no record of either. There is room for what it takes to send the
 * SYN again: window, checksum and options (40 bytes).
 */
struct syn_record {
	__u64 tag;
	__u64 sequences; /* initial sequence numbers of the last two that differ, the later one in the lower half; host order */
	__u32 former;    /* the backend of an older flow of these ports; 0: not known; BACKEND_GONE: that one had closed */
	__u8 room[44];
};

/* Full NAT: the flow that a SNAT mapping belongs to. `ports` as in the client's packets. */
struct snat_tuple {
	struct address client;
	__u32 ports;
	__u32 service;
};

/* Per CPU: how many flows were remembered in this tick. */
struct flow_budget {
	__u32 tick;
	__u32 used;
};

/* Per CPU. The names are those of metrics. */
struct flow_counters {
	__u64 remembered;     /* flows written into the cache */
	__u64 recalled;       /* packets that went where the cache said */
	__u64 evicted_idle;   /* ended or idle flows that gave their place to others */
	__u64 evicted_live;   /* live ones that did: the cache is too small for this change of the pool */
	__u64 not_remembered; /* no place or no budget: sent to the slot's previous backend instead */
};

/* Per CPU, per backend. The names are those of the metrics. */
struct backend_counters {
	__u64 packets;       /* towards the backend */
	__u64 bytes;         /* of IP, without link layer and without our encapsulation */
	__u64 new_flows;     /* TCP: SYNs */
	__u64 reply_packets; /* NAT: replies rewritten */
	__u64 reply_bytes;
};

/* Per CPU, per service (0: no service could be named). The names are the reasons in `drops` of `xdplb stats -o json`. */
struct drop_counters {
	__u64 malformed;        /* headers truncated, or lengths that contradict the frame */
	__u64 martian_source;   /* its source is one that no router forwards, or an address of services (RFC 1812 5.3.7) */
	__u64 no_backend;       /* no backend serves and the service has nothing better to say */
	__u64 rejected;         /* no backend serves: answered with a reset or an ICMP error */
	__u64 too_big;          /* does not fit the way to the backend: answered with "too big" */
	__u64 fragment_unknown; /* a fragment that may be a service's, whose first one did not pass here */
	__u64 ports_exhausted;  /* full NAT: all places that the flow could have are taken by live ones */
	__u64 ports_in_use;     /* NAT: another flow has the client's address and port at the backend: answered likewise */
	__u64 unanswerable;     /* an answer was due, but the packet must not have one (RFC 1122 3.2.2; a reset) */
	__u64 answer_limited;   /* an answer was due, but there were too many lately (answer_limit.h) */
};

/* Per CPU: what happened to all packets. Ordered as enum xdp_action. */
struct verdict_counters {
	__u64 aborted;
	__u64 drop;
	__u64 pass;
	__u64 tx;
	__u64 redirect;
};

/* By NAT backend: what has to be known of its replies before their flows are looked up (nat.h). */
struct nat_hint {
	__u32 looks; /* 1 once something passed the services on its way from or to the backend */
	__u32 until; /* in ticks: up to then, what is not remembered is a reply. Flows may be older than their memory. */
};

/* A datagram that was cut into fragments. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u8 protocol;
	__u8 pad[3];
};

struct fragment {
	__u32 backend; /* 0: for no service */
	__u32 reply;   /* 1: on its way from the backend */
};

/* Metadata of a tail call: what one program leaves for the next one. */
struct tail_call {
	__u32 service;
	__u32 kind; /* enum answer */
	__u32 mtu;  /* for "too big" */
	__u32 backend;
	__u32 link_length; /* of what has VLAN tags, and leaves by the interface `ifindex` */
	__u32 ifindex;
	__be16 port; /* the client's, as the backend is to see it */
	__u8 pad[6];
};

/* Where the headers of a packet are and what they say, while the verifier looks away (parse.h). */
struct found {
	__u32 parsed; /* enum parsed */
	__u32 pad;
	__u32 link_length;
	__u32 transport_offset;
	__u32 length;
	__u32 transport_length;
	__u32 fragment_id;
	__u32 version;
	__u32 protocol;
	__u32 fragment;
};

/* A source's share of ICMP errors: credit grows from `since` on, in nanoseconds. */
struct answer_budget {
	__u64 source; /* the keyed hash of its address */
	__u64 since;
};

/* Facts about interfaces whose words have one hash (links.h), a cache line of them. A word of 0 is free. */
struct link_facts {
	__u64 word[8];
};

/* What xdplb_explain sees of a packet's way. Ids are 0 where there is none. */
struct trace {
	__u64 remembered; /* the flow's word in the cache; 0: not there */
	struct transition transition;
	__u32 subject; /* enum subject: what the fields below are about */
	__u32 service;
	__u32 service_flags;
	__u32 slots;     /* how many the service has */
	__u32 slot;      /* number of the flow's, from 0 on */
	__u32 slot_word; /* what stands there */
	__u32 tick;      /* now */
	__u32 backend;   /* where the packet goes, or comes from */
	__u32 former;    /* that would have it if the flow were not remembered */
	__u32 scheduled; /* that would if the packet were the first of its flow */
	__u32 ifindex;   /* by which it leaves */
	__u32 largest;   /* the largest IP packet that goes the same way */
	__u32 in_use;    /* 1 where a SYN would go there as well, because what is remembered lives */
};

_Static_assert(sizeof(struct flow_set) == 64, "a set is one cache line");
_Static_assert(sizeof(struct link_facts) == 64, "a set is one cache line");
_Static_assert(sizeof(struct syn_record) == 64, "a record is one cache line");
_Static_assert(sizeof(struct address_bucket) == 64, "a bucket is one cache line");
_Static_assert(sizeof(struct service) == 64, "a service is one cache line");
_Static_assert(__builtin_offsetof(struct service, slots) % 8 == 0, "slots and slot_mask are one word");
_Static_assert(sizeof(struct backend) == 64, "a backend is one cache line");
_Static_assert(sizeof(struct fragment_key) == 40, "no hidden padding in keys");

#endif

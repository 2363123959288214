"""The mappings of the configuration file as pydantic models: which keys there are, and what form each value has."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import ModelSchema, WithDefaultSchema

from xdplb import model
from xdplb.config.check_values import (
    Authorities,
    Expectation,
    ExpectationOf,
    parse_authorities,
    parse_check_host,
    parse_check_path,
    parse_command,
    parse_dns_name,
    parse_expect,
    parse_send,
    parse_server_name,
    parse_tls_version,
)
from xdplb.config.values import (
    DURATION,
    NAME,
    AffinityWord,
    ControlLoss,
    Endpoint,
    choice,
    parse_affinity,
    parse_allow,
    parse_control_loss,
    parse_deny,
    parse_endpoint,
    parse_hash_key,
    parse_host_interval,
    parse_idle,
    parse_interface,
    parse_interval,
    parse_limit,
    parse_listen,
    parse_name,
    parse_slow_start,
    parse_sources,
    parse_tunnel_prefix,
)
from xdplb.model import (
    Address,
    Affinity,
    CheckType,
    CheckVia,
    DnsRecord,
    FlowMemory,
    Forward,
    Listen,
    Network,
    OnAllDown,
    OnDown,
    OnRemove,
    Scheduler,
    TlsVersion,
    Upkeep,
)


def _words(available: type[StrEnum]) -> WithJsonSchema:
    return WithJsonSchema({"enum": [member.value for member in available]})


def _word_or_settings(available: type[StrEnum], **settings: str) -> WithJsonSchema:
    """Any of the words, or the last one with settings of these JSON types."""
    properties = {key: {"type": kind} for key, kind in settings.items()}
    inner = {"type": "object", "properties": properties, "additionalProperties": False}
    last = list(available)[-1].value
    mapping = {"type": "object", "properties": {last: inner}, "additionalProperties": False}
    return WithJsonSchema({"anyOf": [{"enum": [member.value for member in available]}, mapping]})


def _one_of_the_texts(*keys: str) -> dict[str, object]:
    properties = {key: {"type": "string"} for key in keys}
    return {"type": "object", "properties": properties, "minProperties": 1, "maxProperties": 1}


_DURATION_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string", "pattern": f"^{DURATION.pattern}$"}, {"const": 0}]})
_TEXT_SCHEMA = WithJsonSchema({"type": "string"})
_NETWORKS_SCHEMA = WithJsonSchema({"type": "array", "items": {"type": "string"}})
_BYTES_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string"}, _one_of_the_texts("text", "hex")]},
)
_EXPECT_SCHEMA = WithJsonSchema({"anyOf": [{"type": ["string", "integer"]}, _one_of_the_texts("text", "hex")]})
_COMMAND_SCHEMA = WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1})
_NAME_SCHEMA = WithJsonSchema({"type": "string", "pattern": f"^{NAME.pattern}$"})
_Interval = Annotated[float, PlainValidator(parse_interval), _DURATION_SCHEMA]
_Idle = Annotated[float, PlainValidator(parse_idle), _DURATION_SCHEMA]
_Limit = Annotated[int, PlainValidator(parse_limit), WithJsonSchema({"type": "integer", "minimum": 0})]
_Port = Annotated[int, Field(ge=1, le=65535)]
_Count = Annotated[int, Field(ge=1, le=255)]
_CHECK = model.Check()
_TLS = model.Tls()
_FLOW_CACHE = model.FlowCache()
_HOST = model.HostUpkeep()


class Part(BaseModel):
    """One mapping of the file. Its field names are the keys people write."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TlsPart(Part):
    """How an https check speaks TLS."""

    verify: bool = _TLS.verify
    """Whether the certificate has to be valid, and be the server's."""
    ca: Annotated[Authorities | None, PlainValidator(parse_authorities), _TEXT_SCHEMA] = None
    """A file of the authorities to trust, instead of the system's."""
    sni: Annotated[str | None, PlainValidator(parse_server_name), _TEXT_SCHEMA] = None
    """The name to ask for, and to find in the certificate; that of `host` where none is given."""
    min_version: Annotated[TlsVersion, PlainValidator(parse_tls_version), _words(TlsVersion)] = _TLS.min_version
    """1.0 and 1.1 are insecure, and only spoken where this allows it."""


class CheckPart(Part):
    """How to find out whether a backend works; a bare word is its type."""

    type: Annotated[CheckType, PlainValidator(choice("check type", CheckType, ())), _words(CheckType)] = _CHECK.type
    interval: _Interval = _CHECK.interval_s
    """From one check to the next."""
    fast_interval: _Interval = _CHECK.fast_interval_s
    """The same while the state is about to change."""
    timeout: _Interval = _CHECK.timeout_s
    rise: _Count = _CHECK.rise
    """Good checks in a row that make a backend up."""
    fall: _Count = _CHECK.fall
    """Bad checks in a row that make a backend down."""
    port: _Port | None = _CHECK.port
    """The backend's own port where none is given."""
    via: Annotated[CheckVia, PlainValidator(choice("way", CheckVia, ())), _words(CheckVia)] = _CHECK.via
    """Whether it goes to the backend itself, or to the service's address and from there as clients' packets do."""
    path: Annotated[str, PlainValidator(parse_check_path), _TEXT_SCHEMA] = _CHECK.path
    host: Annotated[str | None, PlainValidator(parse_check_host), _TEXT_SCHEMA] = _CHECK.host
    """The Host header, and for https the name asked for by SNI."""
    expect: Annotated[Expectation | None, PlainValidator(parse_expect), _EXPECT_SCHEMA] = None
    """Of a working backend. HTTP status codes: 200, 200-399, or 200,301-302. DNS response codes: NOERROR,NXDOMAIN.
    udp: answer, no-refusal, {text: pong} or {hex: 00ff}.
    """
    tls: TlsPart = TlsPart()
    """Of https checks."""
    send: Annotated[bytes, PlainValidator(parse_send), _BYTES_SCHEMA] = _CHECK.send
    """What udp and agent checks say: hello, or {hex: 00ff}."""
    name: Annotated[str | None, PlainValidator(parse_dns_name), _TEXT_SCHEMA] = None
    """What dns checks ask for."""
    record: Annotated[DnsRecord, PlainValidator(choice("record type", DnsRecord, ())), _words(DnsRecord)] = (
        _CHECK.record
    )
    """The type of record that dns checks ask for."""
    command: Annotated[tuple[str, ...], PlainValidator(parse_command), _COMMAND_SCHEMA] = _CHECK.command
    """The program of exec checks, and its arguments; no shell reads them."""

    @model_validator(mode="before")
    @classmethod
    def _bare_type(cls, value: object) -> object:
        if isinstance(value, dict) and {"type", "expect"} <= value.keys():
            return value | {"expect": ExpectationOf(value["type"], value["expect"])}
        return {"type": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": list(CheckType)}, handler.resolve_ref_schema(handler(core_schema))]}


class LimitsPart(Part):
    """A second; 0 means no limit."""

    new_flows_per_client: _Limit = 0
    packets_per_client: _Limit = 0
    new_flows: _Limit = 0


class SettingsPart(Part):
    """What a service and `defaults` may both set."""

    forward: Annotated[Forward, PlainValidator(choice("forward mode", Forward, ())), _words(Forward)] = Forward.NAT
    scheduler: Annotated[
        Scheduler,
        PlainValidator(choice("scheduler", Scheduler, ())),
        _words(Scheduler),
    ] = Scheduler.MAGLEV
    affinity: Annotated[
        Affinity | None,
        PlainValidator(parse_affinity),
        _word_or_settings(AffinityWord, prefix4="integer", prefix6="integer", timeout="string"),
    ] = None
    """client: all flows of a client go to one backend."""
    check: CheckPart = CheckPart()
    slow_start: Annotated[float, PlainValidator(parse_slow_start), _DURATION_SCHEMA] = 0.0
    """For how long a backend that came back or is new grows into its weight."""
    on_down: Annotated[OnDown, PlainValidator(choice("on_down policy", OnDown, ())), _words(OnDown)] = OnDown.REHASH
    """Flows of a backend that is down are scheduled anew, or kept."""
    on_remove: Annotated[OnRemove, PlainValidator(choice("on_remove policy", OnRemove, ())), _words(OnRemove)] = (
        OnRemove.REHASH
    )
    """TCP flows of a backend that is no longer in the file are scheduled anew, or get a reset."""
    on_all_down: Annotated[
        OnAllDown, PlainValidator(choice("on_all_down policy", OnAllDown, ())), _words(OnAllDown)
    ] = OnAllDown.REJECT
    flows: Annotated[FlowMemory, PlainValidator(choice("flows policy", FlowMemory, ())), _words(FlowMemory)] = (
        FlowMemory.REMEMBER
    )
    """none for services such as DNS, whose flows are one question and one answer; all to have them counted."""
    allow: Annotated[list[Network], PlainValidator(parse_allow), _NETWORKS_SCHEMA] = []
    deny: Annotated[list[Network], PlainValidator(parse_deny), _NETWORKS_SCHEMA] = []
    limits: LimitsPart = LimitsPart()
    gue_port: _Port = 6080
    """The UDP port on which backends take gue."""


class FlowCachePart(Part):
    """The memory of flows that a change of the pool could break, on all services."""

    capacity: Annotated[int, Field(ge=1024, le=1 << 26)] = _FLOW_CACHE.capacity
    """How many flows, at 8 bytes each; small is fast."""
    window: _Interval = _FLOW_CACHE.window_s
    """For how long flows that nobody remembers belong to the backend their slot had before."""
    established: _Idle = _FLOW_CACHE.established_s
    """After how long an idle TCP flow counts as ended."""
    closing: _Idle = _FLOW_CACHE.closing_s
    """The same after a FIN or a reset."""
    opening: _Idle = _FLOW_CACHE.opening_s
    """The same after a SYN alone."""
    datagram: _Idle = _FLOW_CACHE.datagram_s
    """The same of UDP."""
    reuse: _Idle = _FLOW_CACHE.reuse_s
    """After how long without a packet a SYN begins anew on the ports of an established TCP flow."""


class HostPart(Part):
    """What xdplb does when somebody changes what it needs of this host."""

    addresses: Annotated[Upkeep, PlainValidator(choice("upkeep of addresses", Upkeep, ())), _words(Upkeep)] = (
        _HOST.addresses
    )
    """mend: adds service addresses that are missing. alarm: changes none, and says what is missing."""
    settings: Annotated[Upkeep, PlainValidator(choice("upkeep of settings", Upkeep, ())), _words(Upkeep)] = (
        _HOST.settings
    )
    """The same of the kernel settings that nat and full-nat need."""
    interval: Annotated[float, PlainValidator(parse_host_interval), _DURATION_SCHEMA] = _HOST.interval_s
    """How often all of it is looked at, also without an event."""


class BackendPart(Part):
    """One server of a service."""

    address: Annotated[Endpoint, PlainValidator(parse_endpoint), _TEXT_SCHEMA]
    """IP address, or IP:port; IPv6 as [2001:db8::1]:8080."""
    name: Annotated[str | None, PlainValidator(parse_name), _NAME_SCHEMA] = None
    """The address as written where none is given."""
    weight: Annotated[int, Field(ge=0, le=65535)] = 1
    backup: bool = False
    """Serves only when no other backend does."""

    @property
    def shown_name(self) -> str:
        return self.address.text if self.name is None else self.name


class ServicePart(SettingsPart):
    """One address and port (or several ports) and the backends behind it."""

    name: Annotated[str, PlainValidator(parse_name), _NAME_SCHEMA]
    listen: Annotated[Listen, PlainValidator(parse_listen), _TEXT_SCHEMA]
    """203.0.113.10:80/tcp or [2001:db8::10]:443/udp; port 0 for all ports, 8000-8099 for a range."""
    backends: list[BackendPart]


class FilePart(Part):
    """The configuration of xdplb."""

    interfaces: list[Annotated[str, PlainValidator(parse_interface), _TEXT_SCHEMA]] = []
    hash_key: Annotated[str, PlainValidator(parse_hash_key), _TEXT_SCHEMA] = ""
    """Shared by the gateways of one cluster; drawn and kept where none is given."""
    tunnel_source: list[Annotated[Network, PlainValidator(parse_tunnel_prefix), _TEXT_SCHEMA]] = []
    """Prefixes, one for each family, that the outer sources of encapsulated packets are drawn from."""
    source_pool: list[Annotated[list[Address], PlainValidator(parse_sources), _TEXT_SCHEMA]] = []
    """Addresses of this host that full-nat sends from: 10.0.0.100, 10.0.0.100-10.0.0.103, or 10.0.1.0/28."""
    flow_cache: FlowCachePart = FlowCachePart()
    on_control_loss: Annotated[
        float | None, PlainValidator(parse_control_loss), _word_or_settings(ControlLoss, after="string")
    ] = None
    """pass: without a daemon the kernel gets the services' packets, after some time; keep: balancing goes on."""
    host: HostPart = HostPart()
    defaults: SettingsPart = SettingsPart()
    services: list[ServicePart]


class Schema(GenerateJsonSchema):
    """Without titles made of class names, and without defaults, which are values here and not what people write."""

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: object) -> bool:
        return False

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        described.pop("title")
        return described

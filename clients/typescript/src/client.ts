/** `Client`, which calls one server. Requests and responses are the messages of the API. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type CallOptions, type Client as Stub, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport, type GrpcTransportOptions } from "@connectrpc/connect-node";

import { decoded } from "./errors.js";
import {
  type GenerateRequestSchema,
  type GenerateResponse,
  type StreamGenerateResponse,
  TextGenerationService,
} from "./gen/mpt/v1/text_generation_pb.js";

export type { CallOptions };

/** A request of `generate` and `stream`; fields that are left out take the server's defaults. */
export type Request = MessageInitShape<typeof GenerateRequestSchema>;

export interface ClientOptions {
  /** The access token, which every call sends. */
  token?: string;
  /** Whether the token may be sent without TLS to another machine, where anyone on the way can read it. */
  allowInsecureToken?: boolean;
  /** The timeout of calls in milliseconds; none by default. */
  timeoutMs?: number;
  interceptors?: Interceptor[];
  /** Options of Node's TLS, such as `{ ca }`. */
  nodeOptions?: GrpcTransportOptions["nodeOptions"];
}

/** A connection to a server. Every call that fails throws an `MptGrpcError`. */
export class Client {
  /** All methods of the API, as generated; their errors are those of Connect. */
  readonly service: Stub<typeof TextGenerationService>;

  /**
   * `url`: the server's gRPC address, such as `http://localhost:50051`, or `https://` with TLS.
   * Throws a `TypeError` for one without a scheme, and for one to which the token must not be sent.
   */
  constructor(url: string, options: ClientOptions = {}) {
    if (!/^https?:\/\//i.test(url)) throw new TypeError(`url: '${url}' must begin with http://, or https:// with TLS`);
    const { token, allowInsecureToken = false, timeoutMs, interceptors = [], nodeOptions } = options;
    if (token !== undefined && !allowInsecureToken && !isPrivate(new URL(url))) {
      const why = "use https://, or allowInsecureToken inside a trusted network";
      throw new TypeError(`url: ${url} is another machine, and the token would be readable: ${why}`);
    }
    const authorize: Interceptor = (next) => (request) => {
      if (token !== undefined) request.header.set("authorization", `Bearer ${token}`);
      return next(request);
    };
    const transport = createGrpcTransport({
      baseUrl: url,
      interceptors: [authorize, ...interceptors],
      defaultTimeoutMs: timeoutMs,
      nodeOptions,
    });
    this.service = createClient(TextGenerationService, transport);
  }

  /** Returns the complete generation. Aborting `options.signal` cancels it on the server. */
  async generate(request: Request, options?: CallOptions): Promise<GenerateResponse> {
    try {
      return await this.service.generate(request, options);
    } catch (error) {
      throw decoded(error);
    }
  }

  /** Yields the generation in chunks. Leaving the loop, or aborting `options.signal`, cancels it on the server. */
  async *stream(request: Request, options?: CallOptions): AsyncGenerator<StreamGenerateResponse> {
    try {
      yield* this.service.streamGenerate(request, options);
    } catch (error) {
      throw decoded(error);
    }
  }
}

/** Whether nobody on the way can read what is sent: with TLS, or on this machine. */
function isPrivate({ protocol, hostname }: URL): boolean {
  return protocol === "https:" || /^(.+\.)?localhost$|^127(\.\d+){3}$|^\[::1\]$/.test(hostname);
}

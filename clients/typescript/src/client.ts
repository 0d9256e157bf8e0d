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

  /** `url`: the server's gRPC address, such as `http://localhost:50051`, or `https://` with TLS. */
  constructor(url: string, options: ClientOptions = {}) {
    const { token, timeoutMs, interceptors = [], nodeOptions } = options;
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

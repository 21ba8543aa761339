{{/* Variables of a process that has the database alone (the migration), and of ledger_sync. Both take a scope. */}}
{{- define "entitlement-gateway.sync.databaseEnv" -}}
- name: ENTITLEMENT_SYNC_DATABASE_URL
  valueFrom:
    secretKeyRef: {{ include "entitlement-gateway.databaseSecret" . | nindent 6 }}
{{- end -}}

{{- define "entitlement-gateway.sync.env" -}}
{{ include "entitlement-gateway.sync.databaseEnv" . }}
- name: ENTITLEMENT_SYNC_REDIS_URL
  valueFrom:
    secretKeyRef: {{ include "entitlement-gateway.redisSecret.sync" . | nindent 6 }}
{{- include "entitlement-gateway.redisTls" (list "ENTITLEMENT_SYNC" .) }}
- name: ENTITLEMENT_SYNC_LISTEN
  value: "0.0.0.0:{{ int64 .Values.ledgerSync.port }}"
{{- with .Values.ledgerSync.tls }}
{{- if .secretName }}
- name: ENTITLEMENT_SYNC_TLS_CERT
  value: /etc/entitlement/tls/tls.crt
- name: ENTITLEMENT_SYNC_TLS_KEY
  value: /etc/entitlement/tls/tls.key
{{- if .clientCa }}
- name: ENTITLEMENT_SYNC_TLS_CLIENT_CA
  value: /etc/entitlement/tls/ca.crt
{{- end }}
{{- else }}
- name: ENTITLEMENT_SYNC_INSECURE
  value: "true"
{{- end }}
{{- end }}
- name: ENTITLEMENT_SYNC_TENANT
  value: {{ .Values.tenant | quote }}
- name: ENTITLEMENT_SYNC_PARTITIONS
  value: {{ int64 .Values.partitions | quote }}
{{- if .Values.metrics.enabled }}
- name: ENTITLEMENT_SYNC_METRICS
  value: "0.0.0.0:{{ int64 .Values.metrics.port }}"
{{- end }}
{{- include "entitlement-gateway.tracing" (list . "ENTITLEMENT_SYNC") }}
{{- range $name, $ref := dict "PUBLISHER" .Values.publisher.urlSecret "WEBHOOK_URL" .Values.webhooks.urlSecret "WEBHOOK_SECRET" .Values.webhooks.signingSecret }}
{{- if $ref.name }}
- name: ENTITLEMENT_SYNC_{{ $name }}
  valueFrom:
    secretKeyRef: {name: {{ $ref.name | quote }}, key: {{ $ref.key | quote }}}
{{- end }}
{{- end }}
{{- include "entitlement-gateway.access.env" (list . "sync") }}
{{- include "entitlement-gateway.settings" (list "ENTITLEMENT_SYNC" .Values.ledgerSync.settings) }}
{{- end -}}
